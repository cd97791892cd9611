// matrix writes README's section on what wgcni works with from the results
// that the tests have left. It runs in the repository's root.
package main

import (
	"fmt"
	"os"
	"path/filepath"

	"github.com/wgcni/wgcni/test/matrix"
)

const (
	readmeFile = "README.md"
	results    = "test/e2e/testdata/matrix"
)

func main() {
	if err := run("."); err != nil {
		fmt.Fprintln(os.Stderr, "matrix:", err)
		os.Exit(1)
	}
}

func run(root string) error {
	before, after, err := render(root)
	if err != nil || before == after {
		return err
	}
	return os.WriteFile(filepath.Join(root, readmeFile), []byte(after), 0o644)
}

// render returns README as it is, and as the results would have it.
func render(root string) (before, after string, err error) {
	text, err := os.ReadFile(filepath.Join(root, readmeFile))
	if err != nil {
		return "", "", err
	}
	userspace, err := matrix.Load(filepath.Join(root, results, matrix.Userspace.File()))
	if err != nil {
		return "", "", err
	}
	kernel, err := matrix.Load(filepath.Join(root, results, matrix.Kernel.File()))
	if err != nil {
		return "", "", err
	}
	after, err = matrix.Replace(string(text), matrix.Section(userspace, kernel))
	return string(text), after, err
}
