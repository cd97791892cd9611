package cluster

import (
	"archive/tar"
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"os"
	"runtime"
)

// PauseImage is the name of the image that sandboxes are made of.
const PauseImage = "wgcni.test/pause:1"

// writePauseImage writes an image of one static binary.
func writePauseImage(archive, binary string) error {
	program, err := os.ReadFile(binary)
	if err != nil {
		return fmt.Errorf("make the pause image (`make containerd` builds what is in it): %w", err)
	}
	return writeImage(archive, PauseImage, "/pause", file{"pause", 0o755, program})
}

// writeImage writes an image of these files, as an archive of OCI's image layout:
// https://github.com/opencontainers/image-spec/blob/v1.1.1/image-layout.md
func writeImage(archive, name, entrypoint string, content ...file) error {
	layer, err := tarOf(content...)
	if err != nil {
		return err
	}
	files := []file{{"oci-layout", 0o644, []byte(`{"imageLayoutVersion":"1.0.0"}`)}}
	blob := func(mediaType string, content []byte) map[string]any {
		sum := sha256.Sum256(content)
		digest := hex.EncodeToString(sum[:])
		files = append(files, file{"blobs/sha256/" + digest, 0o644, content})
		return map[string]any{"mediaType": mediaType, "digest": "sha256:" + digest, "size": len(content)}
	}
	const oci = "application/vnd.oci.image."
	rootfs := blob(oci+"layer.v1.tar", layer)
	platform := map[string]any{"architecture": runtime.GOARCH, "os": "linux"}
	config := blob(oci+"config.v1+json", mustJSON(map[string]any{
		"architecture": runtime.GOARCH, "os": "linux",
		"config": map[string]any{"Entrypoint": []string{entrypoint}},
		"rootfs": map[string]any{"type": "layers", "diff_ids": []any{rootfs["digest"]}},
	}))
	manifest := blob(oci+"manifest.v1+json", mustJSON(map[string]any{
		"schemaVersion": 2, "mediaType": oci + "manifest.v1+json", "config": config, "layers": []any{rootfs},
	}))
	manifest["platform"] = platform
	manifest["annotations"] = map[string]string{"io.containerd.image.name": name}
	files = append(files, file{"index.json", 0o644, mustJSON(map[string]any{"schemaVersion": 2, "manifests": []any{manifest}})})
	image, err := tarOf(files...)
	if err != nil {
		return err
	}
	return os.WriteFile(archive, image, 0o644)
}

type file struct {
	name    string
	mode    int64
	content []byte
}

func tarOf(files ...file) ([]byte, error) {
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for _, f := range files {
		if err := w.WriteHeader(&tar.Header{Name: f.name, Mode: f.mode, Size: int64(len(f.content))}); err != nil {
			return nil, fmt.Errorf("archive %s: %w", f.name, err)
		}
		if _, err := w.Write(f.content); err != nil {
			return nil, fmt.Errorf("archive %s: %w", f.name, err)
		}
	}
	return b.Bytes(), w.Close()
}

// mustJSON is for values that are made of maps, slices and texts alone.
func mustJSON(v any) []byte {
	b, err := json.Marshal(v)
	if err != nil {
		panic(err)
	}
	return b
}
