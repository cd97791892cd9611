package identity

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"golang.zx2c4.com/wireguard/wgctrl/wgtypes"

	"github.com/wgcni/wgcni/pkg/durable"
	"github.com/wgcni/wgcni/pkg/mesh"
)

// rotationFile says how old the key is and how far its rotation has come.
const rotationFile = "rotation.json"

func rotationPath(stateDir string) string { return filepath.Join(stateDir, rotationFile) }

// rotation is what that file holds.
type rotation struct {
	Since    time.Time  `json:"since"`
	Answered time.Time  `json:"answered,omitzero"`
	Stage    mesh.Stage `json:"stage,omitempty"`
	// Next is the public key that Stage mesh.Out changes to. Once it is the one in
	// use, the stage is mesh.Back, whether or not the file has come to say so.
	Next string `json:"next,omitempty"`
}

// readRotation reads the state. A missing file is fs.ErrNotExist.
func readRotation(stateDir string) (rotation, error) {
	var r rotation
	text, err := ReadSecretFile(rotationPath(stateDir), maxStateFile)
	if err != nil {
		return r, err
	}
	err = json.Unmarshal(text, &r)
	if err == nil && r.Stage != mesh.Resting && r.Stage != mesh.Out && r.Stage != mesh.Back {
		err = fmt.Errorf("no such stage: %.20q", r.Stage)
	}
	if err == nil && r.Stage == mesh.Out {
		_, err = wgtypes.ParseKey(r.Next)
	}
	if err == nil && r.Since.IsZero() {
		err = errors.New("no time since when the key is in use")
	}
	if err != nil {
		return rotation{}, fmt.Errorf("%s is damaged (%w): delete it; a rotation that was going on is given up then", rotationPath(stateDir), err)
	}
	return r, nil
}

func writeRotation(stateDir string, k Keys) error {
	r := rotation{Since: k.Since, Answered: k.Answered, Stage: k.Stage}
	if k.Stage == mesh.Out {
		r.Next = k.Next.String()
	}
	return writeJSON(stateDir, rotationPath(stateDir), r)
}

// maxStateFile bounds the files that are read back from the state folder.
const maxStateFile = 4 << 10

func writeJSON(stateDir, path string, value any) error {
	text, err := json.Marshal(value)
	if err != nil {
		return err
	}
	return writeFile(stateDir, path, string(text)+"\n")
}

// changing is called before each change to the state folder. Tests have it fail
// there, which is what a kill at this moment leaves.
var changing = func() error { return nil }

// writeFile replaces a file, and makes its folder. A power cut leaves the old one or
// the new one, and from the return on the new.
func writeFile(stateDir, path, text string) error {
	err := changing()
	if err == nil {
		err = durable.MkdirAll(stateDir, 0o700)
	}
	if err == nil {
		err = durable.Replace(path, []byte(text), 0o600)
	}
	if err != nil {
		return fmt.Errorf("write %s: %w", path, err)
	}
	return nil
}

func rename(from, to string) error {
	if err := changing(); err != nil {
		return fmt.Errorf("rename %s: %w", from, err)
	}
	return os.Rename(from, to)
}

// syncFolder makes the names in a folder durable, as fsync(2) has it.
func syncFolder(path string) error {
	if err := changing(); err != nil {
		return fmt.Errorf("sync %s: %w", path, err)
	}
	return durable.SyncFolder(path)
}
