package e2e

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"github.com/wgcni/wgcni/pkg/kernel"
	"github.com/wgcni/wgcni/test/matrix"
)

// matrixEnv names a folder that TestMatrix writes its results to, instead of
// comparing them with those of testdata/matrix, where README's marks come from.
const matrixEnv = "WGCNI_MATRIX"

// cellTimeout bounds a cell: a slow machine needs a few seconds.
const cellTimeout = 60 * time.Second

// errImpossible says that this kernel lacks what a cell's plugins need.
var errImpossible = errors.New("this kernel cannot")

// A cell is one mark of README's tables. Its run returns nil if all is as the
// expected outcome promises.
type cell struct {
	matrix.Cell // its Outcome is that of a run that returns nil
	run         func(ctx context.Context) error
}

// TestMatrix runs every combination on one pair of nodes. What it sees must be
// what README says.
func TestMatrix(t *testing.T) {
	kind := matrix.Userspace
	if kernel.HasWireGuard() {
		kind = matrix.Kernel
	}
	committed, err := matrix.Load(filepath.Join("testdata", "matrix", kind.File()))
	if err != nil {
		t.Fatal(err)
	}
	folder := os.Getenv(matrixEnv)
	b := newBed(t)
	var results []matrix.Cell
	cells := slices.Concat(b.primaryCells(), b.chainCells())
	for _, old := range committed {
		if !slices.ContainsFunc(cells, func(c cell) bool { return c.Name() == old.Name() }) && folder == "" {
			t.Errorf("README has a mark that no test makes: %s", old.Name())
		}
	}
	for _, c := range cells {
		t.Run(c.Name(), func(t *testing.T) {
			ctx, cancel := context.WithTimeout(t.Context(), cellTimeout)
			defer cancel()
			err := c.run(ctx)
			got, want := c.Cell, matrix.Find(committed, c.Name())
			switch {
			case errors.Is(err, errImpossible):
				got.Outcome = matrix.Impossible
			case err != nil:
				got.Outcome = matrix.Fails
			}
			results = append(results, got)
			switch {
			case folder != "" || got.Outcome == want:
				t.Log(got.Outcome, err)
			case want != "" && (want == matrix.Impossible || got.Outcome == matrix.Impossible):
				t.Logf("%s here, while README's mark was made where it %s", got.Outcome, want)
			default:
				t.Errorf("%s, and README says %q: %v", got.Outcome, want, err)
			}
		})
	}
	if folder == "" {
		return
	}
	// Cells that were not asked for keep their marks.
	var all []matrix.Cell
	for _, c := range cells {
		outcome := matrix.Find(results, c.Name())
		if outcome == "" {
			outcome = matrix.Find(committed, c.Name())
		}
		if c.Outcome = outcome; outcome != "" {
			all = append(all, c.Cell)
		}
	}
	if err := matrix.Save(filepath.Join(folder, kind.File()), all); err != nil {
		t.Fatal(err)
	}
}
