package main

import (
	"fmt"
	"io"
	"log/slog"
	"slices"
	"strings"

	"github.com/spf13/pflag"
)

// logFormats and logLevels are what --log and --log-level take.
var (
	logFormats = []string{"text", "json"}
	logLevels  = []string{"debug", "info", "warn", "error"}
)

// logFlags say how a command that goes on running logs.
type logFlags struct{ format, level string }

func (f *logFlags) register(flags *pflag.FlagSet) {
	flags.StringVar(&f.format, "log", logFormats[0], "log format: text or json, both with the same keys")
	flags.StringVar(&f.level, "log-level", "info", "log what is of this level at least: debug, info, warn or error")
}

// logger logs to w. The error names the flag that is wrong.
func (f logFlags) logger(w io.Writer) (*slog.Logger, error) {
	var level slog.Level
	if !slices.Contains(logLevels, f.level) {
		return nil, fmt.Errorf("--log-level: %q is none of %s", f.level, strings.Join(logLevels, ", "))
	}
	if err := level.UnmarshalText([]byte(f.level)); err != nil {
		return nil, fmt.Errorf("--log-level: %w", err)
	}
	o := &slog.HandlerOptions{Level: level}
	switch f.format {
	case "text":
		return slog.New(slog.NewTextHandler(w, o)), nil
	case "json":
		return slog.New(slog.NewJSONHandler(w, o)), nil
	}
	return nil, fmt.Errorf("--log: %q is neither text nor json", f.format)
}
