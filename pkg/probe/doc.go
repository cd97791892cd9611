// Package probe sends packets to see what becomes of them.
package probe
