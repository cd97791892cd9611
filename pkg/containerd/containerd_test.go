package containerd_test

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/wgcni/wgcni/pkg/containerd"
)

func TestRead(t *testing.T) {
	for name, c := range map[string]struct {
		text string
		want containerd.Config
	}{
		"nothing of CNI": {"version = 2\n", containerd.Config{MaxConfNum: -1}},
		// As its package in Debian 12 has it.
		"Debian's": {`version = 2

[plugins]
  [plugins."io.containerd.grpc.v1.cri"]
    [plugins."io.containerd.grpc.v1.cri".cni]
      bin_dir = "/usr/lib/cni"
      conf_dir = "/etc/cni/net.d"
`, containerd.Config{MaxConfNum: -1, ConfDir: "/etc/cni/net.d", BinDir: "/usr/lib/cni"}},
		// As `containerd config default` prints it since 2.1.
		"containerd 2": {`version = 3
[plugins.'io.containerd.cri.v1.runtime'.cni]
  bin_dir = ''
  bin_dirs = ['/opt/cni/bin', '/usr/libexec/cni']
  conf_dir = '/etc/cni/net.d'
  max_conf_num = 1
`, containerd.Config{MaxConfNum: 1, ConfDir: "/etc/cni/net.d", BinDir: "/opt/cni/bin"}},
		"commented out": {"# bin_dir = \"/x\"\n#max_conf_num = 7\n", containerd.Config{MaxConfNum: -1}},
	} {
		t.Run(name, func(t *testing.T) {
			c.want.File = filepath.Join(t.TempDir(), "config.toml")
			if err := os.WriteFile(c.want.File, []byte(c.text), 0o600); err != nil {
				t.Fatal(err)
			}
			if got := containerd.Read(c.want.File); got != c.want {
				t.Errorf("%+v; want %+v", got, c.want)
			}
		})
	}
	if got, want := containerd.Read("/nowhere"), (containerd.Config{MaxConfNum: -1}); got != want {
		t.Errorf("no file: %+v; want %+v", got, want)
	}
}
