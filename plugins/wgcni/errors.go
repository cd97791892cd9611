package main

import (
	"errors"

	"github.com/containernetworking/cni/pkg/types"

	"github.com/wgcni/wgcni/pkg/config"
	"github.com/wgcni/wgcni/pkg/kernel"
	"github.com/wgcni/wgcni/pkg/store"
)

// fault is an error with its CNI code and what the operator can do about it.
type fault struct {
	code uint
	err  error
	mend string
}

func (f *fault) Error() string { return f.err.Error() }
func (f *fault) Unwrap() error { return f.err }

func faultf(code uint, mend string, err error) error { return &fault{code, err, mend} }

// cniError is the one place where errors get their CNI codes. skel drops the
// text around an inner types.Error, so there is none below this.
func cniError(err error) *types.Error {
	var (
		f       *fault
		invalid *config.Error
	)
	switch {
	case errors.As(err, &f):
		return types.NewError(f.code, err.Error(), f.mend)
	case errors.As(err, &invalid):
		return types.NewError(types.ErrInvalidNetworkConfig, "invalid configuration of wgcni: "+err.Error(), "correct the wgcni entry in the network configuration list")
	case errors.Is(err, store.ErrLocked):
		return types.NewError(types.ErrTryAgainLater, err.Error(), "try again; if it stays so, find the holder with `fuser`")
	case errors.Is(err, kernel.ErrBypassesHost):
		return types.NewError(types.ErrInvalidNetworkConfig, err.Error(), "chain wgcni after a primary plugin that routes through the node, such as bridge or ptp")
	}
	return types.NewError(types.ErrInternal, err.Error(), "run `wgcnid status` on the node")
}
