// chaos takes over what campaigns have found, from the folder that is given, if one
// is; prints it, and writes it into README. It runs in the repository's root.
package main

import (
	"fmt"
	"os"
	"path/filepath"

	"github.com/wgcni/wgcni/test/chaos"
)

const (
	readmeFile = "README.md"
	resultsDir = "test/chaos/testdata"
)

func main() {
	if err := run(".", os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, "chaos:", err)
		os.Exit(1)
	}
}

func run(root string, folders []string) error {
	for _, dir := range folders {
		if err := take(dir, filepath.Join(root, resultsDir)); err != nil {
			return err
		}
	}
	results, err := chaos.Load(filepath.Join(root, resultsDir))
	if err != nil {
		return err
	}
	fmt.Print(chaos.Table(results))
	before, after, err := render(root)
	if err != nil || before == after {
		return err
	}
	return os.WriteFile(filepath.Join(root, readmeFile), []byte(after), 0o644)
}

// take puts new results into the place of older ones.
func take(from, to string) error {
	results, err := chaos.Load(from)
	if err != nil {
		return err
	}
	for _, r := range results {
		if err := r.Write(to); err != nil {
			return err
		}
	}
	return nil
}

// render returns README as it is, and as the results would have it.
func render(root string) (before, after string, err error) {
	text, err := os.ReadFile(filepath.Join(root, readmeFile))
	if err != nil {
		return "", "", err
	}
	results, err := chaos.Load(filepath.Join(root, resultsDir))
	if err != nil {
		return "", "", err
	}
	after, err = chaos.Replace(string(text), chaos.Table(results))
	return string(text), after, err
}
