package identity

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"github.com/wgcni/wgcni/pkg/mesh"
)

// orderFile is how `wgcnid key rotate` tells the helper.
const orderFile = "rotate.json"

// Order asks the helper for a rotation of the node's key.
type Order struct {
	At      time.Time `json:"at"`
	Cluster bool      `json:"cluster,omitempty"` // of all nodes' keys
	Force   bool      `json:"force,omitempty"`   // gives up the pairs that do not follow
}

// OrderPath is the file in which an order waits for the helper.
func OrderPath(stateDir string) string { return filepath.Join(stateDir, orderFile) }

// Ordered reports whether an order waits for the helper.
func Ordered(stateDir string) bool {
	_, err := os.Stat(OrderPath(stateDir))
	return err == nil
}

// WriteOrder leaves an order for the helper. One that it has not taken yet is part
// of the new one.
func WriteOrder(stateDir string, o Order) error {
	if before, err := readOrder(stateDir); err == nil {
		o.Cluster, o.Force = o.Cluster || before.Cluster, o.Force || before.Force
	}
	o.At = mesh.ClaimTime(o.At)
	return writeJSON(stateDir, OrderPath(stateDir), o)
}

// CarryOutOrder hands the order to carry, and removes it when that has succeeded: a kill
// in between has it carried out again. One that makes no sense is removed too, so
// that its error is returned once.
func CarryOutOrder(stateDir string, carry func(Order) error) error {
	o, err := readOrder(stateDir)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return nil
	case err != nil:
		return errors.Join(err, removeOrder(stateDir))
	}
	if err := carry(o); err != nil {
		return err
	}
	return removeOrder(stateDir)
}

func removeOrder(stateDir string) error {
	if err := changing(); err != nil {
		return err
	}
	if err := os.Remove(OrderPath(stateDir)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return syncFolder(stateDir)
}

func readOrder(stateDir string) (Order, error) {
	var o Order
	text, err := ReadSecretFile(OrderPath(stateDir), maxStateFile)
	if err != nil {
		return o, err
	}
	if err = json.Unmarshal(text, &o); err == nil && o.At.IsZero() {
		err = errors.New("no time")
	}
	if err != nil {
		return Order{}, fmt.Errorf("%s is no order (%w), and is removed: run `wgcnid key rotate` again", OrderPath(stateDir), err)
	}
	return o, nil
}
