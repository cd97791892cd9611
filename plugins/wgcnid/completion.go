package main

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/wgcni/wgcni/pkg/config"
	"github.com/wgcni/wgcni/pkg/registry"
)

// completionTimeout bounds what somebody who has pressed Tab waits for the registry.
const completionTimeout = time.Second

func completionCommand() *cobra.Command {
	shells := []string{"bash", "zsh", "fish"}
	return &cobra.Command{
		Use:   "completion " + strings.Join(shells, "|"),
		Short: "Print what makes a shell complete commands, flags and names",
		Long: `Print the script that makes a shell complete wgcnid's commands and flags, and the
names of nodes and peers. Names are this node's own knowledge, which root may read.`,
		Example: `  source <(wgcnid completion bash)   # this shell; needs the package bash-completion
  wgcnid completion bash > /etc/bash_completion.d/wgcnid
  wgcnid completion zsh > "${fpath[1]}/_wgcnid"
  wgcnid completion fish > ~/.config/fish/completions/wgcnid.fish`,
		ValidArgs:             shells,
		DisableFlagsInUseLine: true,
		Args: func(_ *cobra.Command, args []string) error {
			switch {
			case len(args) != 1:
				return errors.New("name one shell: `wgcnid completion bash`, zsh or fish")
			case !slices.Contains(shells, args[0]):
				return fmt.Errorf("no completion for the shell %s: `wgcnid completion bash`, zsh or fish", strconv.Quote(args[0]))
			}
			return nil
		},
		RunE: func(cmd *cobra.Command, args []string) error {
			root, out := cmd.Root(), cmd.OutOrStdout()
			switch args[0] {
			case "zsh":
				return root.GenZshCompletion(out)
			case "fish":
				return root.GenFishCompletion(out, true)
			}
			return root.GenBashCompletionV2(out, true)
		},
	}
}

// completed are the commands whose arguments are names of machines.
var completed = map[string]struct {
	most    int // how many names it takes
	offered func(config.Config, registry.Record) bool
}{
	"forget":      {1, another},
	"peer config": {1, plain},
	"peer remove": {1, plain},
	"doctor":      {maxNames, another},
	"verify":      {1, another},
	"explain":     {2, anyMachine},
}

// maxNames stands for as many as one likes.
const maxNames = 1 << 20

func anyMachine(config.Config, registry.Record) bool     { return true }
func another(c config.Config, r registry.Record) bool    { return r.Name != c.NodeName }
func plain(_ config.Config, r registry.Record) bool      { return len(r.Via) > 0 }
func runsWgcnid(_ config.Config, r registry.Record) bool { return len(r.Via) == 0 }
func fixed(words ...string) cobra.CompletionFunc         { return cobra.FixedCompletions(words, noFiles) }

func (o *options) nodeNames() cobra.CompletionFunc { return o.names(maxNames, runsWgcnid) }

func noArguments(*cobra.Command, []string, string) ([]string, cobra.ShellCompDirective) {
	return nil, noFiles
}

const noFiles = cobra.ShellCompDirectiveNoFileComp

// completeArguments says for all commands below parent what their arguments may
// be. Files they are never.
func completeArguments(parent *cobra.Command, o *options) {
	for _, cmd := range parent.Commands() {
		_, path, _ := strings.Cut(cmd.CommandPath(), " ")
		if c, ok := completed[path]; ok {
			cmd.ValidArgsFunction = o.names(c.most, c.offered)
		} else if cmd.ValidArgsFunction == nil && len(cmd.ValidArgs) == 0 {
			cmd.ValidArgsFunction = noArguments
		}
		for flag, complete := range map[string]cobra.CompletionFunc{
			"log": fixed(logFormats...), "log-level": fixed(logLevels...), "via": o.nodeNames(),
		} {
			if cmd.Flags().Lookup(flag) != nil {
				_ = cmd.RegisterFlagCompletionFunc(flag, complete) // fails for a flag that is not there
			}
		}
		if path == "graph" {
			_ = cmd.RegisterFlagCompletionFunc("format", fixed(formatSVG, formatDOT, formatMermaid, formatJSON))
		}
		completeArguments(cmd, o)
	}
}

// names offers machines of the mesh, each once and at most that many. What
// cannot be read offers none: there is nobody to tell.
func (o *options) names(most int, offered func(config.Config, registry.Record) bool) cobra.CompletionFunc {
	return func(cmd *cobra.Command, args []string, begin string) (out []string, _ cobra.ShellCompDirective) {
		c, err := o.loadLast()
		if err != nil || len(args) >= most {
			return nil, noFiles
		}
		parent := cmd.Context()
		if parent == nil {
			parent = context.Background()
		}
		ctx, cancel := context.WithTimeout(parent, completionTimeout)
		defer cancel()
		v, err := viewMesh(ctx, c)
		if err != nil {
			return nil, noFiles
		}
		for _, r := range v.records.Records() {
			if !r.Left && offered(c, r) && strings.HasPrefix(r.Name, begin) && !slices.Contains(args, r.Name) {
				out = append(out, r.Name)
			}
		}
		return out, noFiles
	}
}
