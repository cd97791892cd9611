package main

import (
	"context"
	"errors"
	"log/slog"
	"path/filepath"
	"time"

	"github.com/wgcni/wgcni/pkg/config"
	"github.com/wgcni/wgcni/pkg/install"
)

// keepInstalled keeps this node's installation, if it has one, until the returned
// function is called.
func keepInstalled(ctx context.Context, stateDir, cniDir string, log *slog.Logger) (stop func()) {
	ctx, cancel := context.WithCancel(ctx)
	done := make(chan struct{})
	go func() {
		defer close(done)
		install.Keep(ctx, stateDir, cniDir, log)
	}()
	return func() {
		cancel()
		<-done
	}
}

// loadInstalled is load for a node on which wgcni was installed: the primary's
// agent may have rewritten its conflist, and the entry is not back yet. Then the
// last configuration goes on.
func (o options) loadInstalled() (config.Config, error) {
	c, err := o.load()
	if o.configFile != "" || !errors.Is(err, config.ErrNotChained) || !installed() {
		return c, err
	}
	if last, lastErr := config.Load(filepath.Join(config.DefaultStateDir, config.LastFile), o.cniDir); lastErr == nil {
		return last, nil
	}
	return c, err
}

// installed reports whether wgcni was installed here, and is not being removed. An
// installation with another stateDir is a copy, whose entry does not get lost.
func installed() bool {
	r, err := install.Load(config.DefaultStateDir)
	return err == nil && r.Stage != install.Removing
}

// awaitEntry is loadInstalled for the helper's start. After a boot, the entry may be
// lost before there is anybody to put it back, or its conflist damaged, and then the
// last configuration goes on. The end of ctx is no error.
func (o options) awaitEntry(ctx context.Context, log *slog.Logger) (config.Config, error) {
	lost := func(err error) bool {
		return o.configFile == "" && errors.Is(err, config.ErrNotChained) && installed()
	}
	if o.configFile == "" && installed() {
		install.Repair(config.DefaultStateDir, o.cniDir, log)
	}
	c, err := o.loadInstalled()
	if err == nil && c.PassedOver != "" {
		return config.LoadLast(o.cniDir)
	}
	if !lost(err) {
		return c, err
	}
	log.Warn("waiting for the primary plugin's network configuration", "error", err)
	defer keepInstalled(ctx, config.DefaultStateDir, o.cniDir, log)()
	for lost(err) && ctx.Err() == nil {
		select {
		case <-time.After(200 * time.Millisecond):
		case <-ctx.Done():
		}
		c, err = o.loadInstalled()
	}
	if ctx.Err() != nil {
		return c, nil
	}
	return c, err
}
