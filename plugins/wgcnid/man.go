//go:build man

// What makes man pages of the help texts is in no binary that gets installed.

package main

import (
	"os"
	"strings"

	"github.com/spf13/cobra"
	"github.com/spf13/cobra/doc"

	"github.com/wgcni/wgcni/pkg/version"
)

func init() { tagged = append(tagged, manCommand) }

func manCommand() *cobra.Command {
	return &cobra.Command{
		Use:    "man FOLDER",
		Short:  "Write the man pages",
		Hidden: true,
		Args:   cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			if err := os.MkdirAll(args[0], 0o755); err != nil {
				return err
			}
			root := cmd.Root()
			root.DisableAutoGenTag = true
			preformat(root)
			return doc.GenManTree(root, &doc.GenManHeader{Source: "wgcni " + version.String(), Manual: "wgcni"}, args[0])
		},
	}
}

// preformat keeps the lines of the help texts that are indented as they are:
// package doc takes a text for Markdown, where two spaces mean nothing.
func preformat(cmd *cobra.Command) {
	const fence = "```\n"
	var b strings.Builder
	inside := false
	for line := range strings.Lines(cmd.Long) {
		if indented := strings.HasPrefix(line, "  "); indented != inside && strings.TrimSpace(line) != "" {
			b.WriteString("\n" + fence)
			inside = indented
		}
		b.WriteString(line)
	}
	if inside {
		b.WriteString("\n" + fence)
	}
	cmd.Long = b.String()
	for _, c := range cmd.Commands() {
		preformat(c)
	}
}
