package kubernetes

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/serializer"
	"k8s.io/apimachinery/pkg/util/validation/field"
	"k8s.io/apimachinery/pkg/util/yaml"
	"k8s.io/kubernetes/pkg/apis/apps"
	appsinstall "k8s.io/kubernetes/pkg/apis/apps/install"
	appsvalidation "k8s.io/kubernetes/pkg/apis/apps/validation"
	"k8s.io/kubernetes/pkg/apis/core"
	coreinstall "k8s.io/kubernetes/pkg/apis/core/install"
	corevalidation "k8s.io/kubernetes/pkg/apis/core/validation"
	"sigs.k8s.io/kustomize/api/krusty"
	"sigs.k8s.io/kustomize/kyaml/filesys"
)

const folder = "../../conflist/kubernetes"

// decoder refuses keys that the API does not know, and sets its defaults.
var decoder = func() runtime.Decoder {
	scheme := runtime.NewScheme()
	appsinstall.Install(scheme)
	coreinstall.Install(scheme)
	return serializer.NewCodecFactory(scheme, serializer.EnableStrict).UniversalDecoder()
}()

func decode(text []byte) (out []runtime.Object, err error) {
	for r := yaml.NewYAMLReader(bufio.NewReader(bytes.NewReader(text))); ; {
		document, err := r.Read()
		if errors.Is(err, io.EOF) {
			return out, nil
		}
		if err != nil {
			return out, err
		}
		o, err := runtime.Decode(decoder, document)
		if err != nil {
			return out, err
		}
		out = append(out, o)
	}
}

// validate is what the API server would refuse.
func validate(o runtime.Object) (string, error) {
	var errs field.ErrorList
	var name string
	switch o := o.(type) {
	case *core.Namespace:
		name, errs = "Namespace "+o.Name, corevalidation.ValidateNamespace(o)
	case *core.ServiceAccount:
		name, errs = "ServiceAccount "+o.Name, corevalidation.ValidateServiceAccount(o)
	case *core.ConfigMap:
		name, errs = "ConfigMap "+o.Name, corevalidation.ValidateConfigMap(o)
	case *core.Secret:
		name, errs = "Secret "+o.Name, corevalidation.ValidateSecret(o)
	case *apps.DaemonSet:
		name, errs = "DaemonSet "+o.Name, appsvalidation.ValidateDaemonSet(o, corevalidation.PodValidationOptions{})
	default:
		return "", fmt.Errorf("a %T: nothing here validates it", o)
	}
	return name, errs.ToAggregate()
}

func read(t *testing.T, file string) []byte {
	t.Helper()
	text, err := os.ReadFile(filepath.Join(folder, file))
	if err != nil {
		t.Fatal(err)
	}
	return text
}

// objects of a text, each of them valid.
func objects(t *testing.T, text []byte) (out []runtime.Object, names []string) {
	t.Helper()
	out, err := decode(text)
	if err != nil {
		t.Fatal(err)
	}
	for _, o := range out {
		name, err := validate(o)
		if err != nil {
			t.Errorf("%s: %v", name, err)
		}
		names = append(names, name)
	}
	return out, names
}

func TestManifestsAreValid(t *testing.T) {
	for file, want := range map[string][]string{
		"wgcni.yaml":     {"Namespace wgcni", "ServiceAccount wgcni", "DaemonSet wgcni"},
		"config.yaml":    {"ConfigMap wgcni", "Secret wgcni"},
		"uninstall.yaml": {"DaemonSet wgcni"}, // it takes the place of the other
	} {
		t.Run(file, func(t *testing.T) {
			if _, names := objects(t, read(t, file)); !slices.Equal(names, want) {
				t.Errorf("%q, want %q", names, want)
			}
		})
	}
}

// Each of these is a fault that a manifest may have, and the check finds.
func TestFaultsAreFound(t *testing.T) {
	text := string(read(t, "wgcni.yaml"))
	for _, tt := range []struct{ old, new, want string }{
		{"enableServiceLinks: false", "enableServicelinks: false", "enableServicelinks"},                                   // no such key
		{"hostNetwork: true", "hostNetwork: yes please", "hostNetwork"},                                                    // no boolean
		{"dnsPolicy: Default", "dnsPolicy: Node", "dnsPolicy"},                                                             // no such value
		{"maxUnavailable: 10%", "maxUnavailable: 0", "maxUnavailable"},                                                     // nothing would ever be updated
		{"- name: state\n              mountPath", "- name: stat\n              mountPath", "volumeMounts"},                // no such volume
		{"matchLabels:\n      app.kubernetes.io/name: wgcni", "matchLabels:\n      app: wgcni", "selector"},                // selects nothing
		{"mountPath: /var/run/netns", "mountPath: /run/netns", "must be unique"},                                           // one over the other
		{"mountPropagation: HostToContainer", "mountPropagation: FromHost", "mountPropagation"},                            //
		{"port: 51822", "port: 151822", "port"},                                                                            //
		{"memory: 64Mi", "memory: 64 MB", "quantities"},                                                                    // no quantity
		{"memory: 64Mi", "memory: 640Mi", "must be less than or equal to memory limit"},                                    //
		{"allowPrivilegeEscalation: false", "allowPrivilegeEscalation: false\n            privileged: true", "privileged"}, // both
	} {
		broken := strings.Replace(text, tt.old, tt.new, 1)
		if broken == text {
			t.Fatalf("no %q in the manifest", tt.old)
		}
		all, err := decode([]byte(broken))
		for _, o := range all {
			_, invalid := validate(o)
			err = errors.Join(err, invalid)
		}
		if err == nil || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%q: %v, want %s", tt.new, err, tt.want)
		}
	}
}

// uninstall.yaml is an update of the DaemonSet that runs, which the API server
// allows: another selector it would not.
func TestUninstallTakesThePlace(t *testing.T) {
	var sets []*apps.DaemonSet
	for _, file := range []string{"wgcni.yaml", "uninstall.yaml"} {
		all, _ := objects(t, read(t, file))
		d := all[len(all)-1].(*apps.DaemonSet)
		d.ResourceVersion = "1"
		sets = append(sets, d)
	}
	sets[1].Spec.TemplateGeneration = sets[0].Spec.TemplateGeneration + 1 // as the API server does
	if errs := appsvalidation.ValidateDaemonSetUpdate(sets[1], sets[0], corevalidation.PodValidationOptions{}); len(errs) > 0 {
		t.Error(errs.ToAggregate())
	}
	sets[1].Spec.Selector = &metav1.LabelSelector{MatchLabels: map[string]string{"app": "wgcni"}}
	sets[1].Spec.Template.Labels["app"] = "wgcni"
	if errs := appsvalidation.ValidateDaemonSetUpdate(sets[1], sets[0], corevalidation.PodValidationOptions{}); len(errs) == 0 {
		t.Error("another selector is allowed")
	}
}

// README.md puts the image's name there by sed.
func TestImages(t *testing.T) {
	for file, want := range map[string]int{"wgcni.yaml": 2, "uninstall.yaml": 2} {
		text := regexp.MustCompile(`(?m)image: wgcni$`).ReplaceAll(read(t, file), []byte("image: registry.example/wgcni:v1"))
		got := images(t, text)
		if len(got) != want || slices.ContainsFunc(got, func(image string) bool { return image != "registry.example/wgcni:v1" }) {
			t.Errorf("%s: %q", file, got)
		}
	}
}

// The objects of both files fit together.
func TestReferences(t *testing.T) {
	all, _ := objects(t, slices.Concat(read(t, "wgcni.yaml"), []byte("\n---\n"), read(t, "config.yaml")))
	there := map[string]bool{}
	for _, o := range all {
		m, err := metaOf(o)
		if err != nil {
			t.Fatal(err)
		}
		if m.Namespace == "" {
			m.Namespace = m.Name // the namespace itself
		}
		there[fmt.Sprintf("%T %s/%s", o, m.Namespace, m.Name)] = true
	}
	for _, file := range []string{"wgcni.yaml", "uninstall.yaml"} {
		all, _ := objects(t, read(t, file))
		d := all[len(all)-1].(*apps.DaemonSet)
		want := []string{
			fmt.Sprintf("%T %s/%s", &core.Namespace{}, d.Namespace, d.Namespace),
			fmt.Sprintf("%T %s/%s", &core.ServiceAccount{}, d.Namespace, d.Spec.Template.Spec.ServiceAccountName),
		}
		for _, v := range d.Spec.Template.Spec.Volumes {
			if v.ConfigMap != nil {
				want = append(want, fmt.Sprintf("%T %s/%s", &core.ConfigMap{}, d.Namespace, v.ConfigMap.Name))
			}
			if v.Secret != nil {
				want = append(want, fmt.Sprintf("%T %s/%s", &core.Secret{}, d.Namespace, v.Secret.SecretName))
			}
			used := 0
			for _, c := range slices.Concat(d.Spec.Template.Spec.InitContainers, d.Spec.Template.Spec.Containers) {
				for _, m := range c.VolumeMounts {
					if m.Name == v.Name {
						used++
					}
				}
			}
			if used == 0 {
				t.Errorf("%s: nobody mounts the volume %s", file, v.Name)
			}
		}
		for _, name := range want {
			if !there[name] {
				t.Errorf("%s: there is no %s", file, name)
			}
		}
	}
}

func metaOf(o runtime.Object) (metav1.ObjectMeta, error) {
	switch o := o.(type) {
	case *core.Namespace:
		return o.ObjectMeta, nil
	case *core.ServiceAccount:
		return o.ObjectMeta, nil
	case *core.ConfigMap:
		return o.ObjectMeta, nil
	case *core.Secret:
		return o.ObjectMeta, nil
	case *apps.DaemonSet:
		return o.ObjectMeta, nil
	}
	return metav1.ObjectMeta{}, fmt.Errorf("a %T", o)
}

// build is `kustomize build`.
func build(t *testing.T, dir string) []byte {
	t.Helper()
	m, err := krusty.MakeKustomizer(krusty.MakeDefaultOptions()).Run(filesys.MakeFsOnDisk(), dir)
	if err != nil {
		t.Fatal(err)
	}
	text, err := m.AsYaml()
	if err != nil {
		t.Fatal(err)
	}
	return text
}

func images(t *testing.T, text []byte) (out []string) {
	t.Helper()
	all, _ := objects(t, text)
	for _, o := range all {
		if d, ok := o.(*apps.DaemonSet); ok {
			for _, c := range slices.Concat(d.Spec.Template.Spec.InitContainers, d.Spec.Template.Spec.Containers) {
				out = append(out, c.Image)
			}
		}
	}
	return out
}

func TestKustomize(t *testing.T) {
	text := build(t, folder)
	_, names := objects(t, text)
	if want := []string{"Namespace wgcni", "ServiceAccount wgcni", "ConfigMap wgcni", "Secret wgcni", "DaemonSet wgcni"}; !slices.Equal(slices.Sorted(slices.Values(names)), slices.Sorted(slices.Values(want))) {
		t.Errorf("%q, want %q", names, want)
	}
	if got := images(t, text); !slices.Equal(got, []string{"wgcni:latest", "wgcni:latest"}) {
		t.Errorf("images %q", got)
	}
}

// The overlay that README.md shows is built as it is there.
func TestOverlayOfTheReadme(t *testing.T) {
	shown := regexp.MustCompile("(?s)```yaml\n(# kustomization.yaml\n.*?)```").FindSubmatch(read(t, "README.md"))
	if shown == nil {
		t.Fatal("README.md shows no overlay")
	}
	base, err := filepath.Abs(folder)
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	if dir, err = filepath.EvalSymlinks(dir); err != nil {
		t.Fatal(err)
	}
	to, err := filepath.Rel(dir, base)
	if err != nil {
		t.Fatal(err)
	}
	kustomization := strings.Replace(string(shown[1]), "../wgcni/conflist/kubernetes", to, 1)
	if kustomization == string(shown[1]) {
		t.Fatal("the overlay does not name the folder of the manifests")
	}
	const entry = `{"clusterCIDRs": ["10.42.0.0/16"], "clusterSecretFile": "/etc/wgcni/secret"}`
	for name, text := range map[string]string{"kustomization.yaml": kustomization, "entry.json": entry, "secret": "s", "ca.crt": "c", "password": "p"} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	text := build(t, dir)
	all, _ := objects(t, text)
	for _, o := range all {
		switch o := o.(type) {
		case *core.ConfigMap:
			if o.Data["entry.json"] != entry {
				t.Errorf("entry.json is %s", o.Data["entry.json"])
			}
		case *core.Secret:
			if string(o.Data["secret"]) != "s" || strings.Contains(string(text), "REPLACE") {
				t.Errorf("the secret is %q", o.Data)
			}
		}
	}
	for _, image := range images(t, text) {
		if !strings.HasPrefix(image, "registry.example/wgcni:v") {
			t.Errorf("image %s", image)
		}
	}
	// Neither name has a hash: uninstall.yaml goes by it.
	if bytes.Contains(text, []byte("name: wgcni-")) {
		t.Errorf("names with a hash:\n%s", text)
	}
}

// What needs the same path on the node and in the container has it.
func TestSharedPaths(t *testing.T) {
	for _, file := range []string{"wgcni.yaml", "uninstall.yaml"} {
		sharedPaths(t, file)
	}
}

func sharedPaths(t *testing.T, file string) {
	t.Helper()
	all, _ := objects(t, read(t, file))
	d := all[len(all)-1].(*apps.DaemonSet)
	source := map[string]string{}
	for _, v := range d.Spec.Template.Spec.Volumes {
		if v.HostPath != nil {
			source[v.Name] = v.HostPath.Path
		}
	}
	for _, c := range slices.Concat(d.Spec.Template.Spec.InitContainers, d.Spec.Template.Spec.Containers) {
		for _, m := range c.VolumeMounts {
			path, host := source[m.Name]
			if host && m.MountPath != path && m.MountPath != "/var"+path && m.MountPath != "/host"+path {
				t.Errorf("%s: %s: %s of the node is %s", file, c.Name, path, m.MountPath)
			}
			if m.Name == "netns" && (m.MountPropagation == nil || *m.MountPropagation != core.MountPropagationMode(corev1.MountPropagationHostToContainer)) {
				t.Errorf("%s: %s: namespaces of new pods do not appear in %s", file, c.Name, m.MountPath)
			}
		}
	}
}
