package identity

import (
	"fmt"
	"io"
)

// hidden is what a secret prints.
const hidden = "(hidden)"

// mute makes what embeds it print itself as "(hidden)", in every way.
type mute struct{}

// Format serves every verb: %d and %x would else print the bytes.
func (mute) Format(s fmt.State, _ rune) { _, _ = io.WriteString(s, hidden) }

func (mute) String() string { return hidden }

// MarshalText serves JSON and slog.
func (mute) MarshalText() ([]byte, error) { return []byte(hidden), nil }

// concealed is a secret value. In an unexported field, where fmt calls no
// methods, it prints the address of the function that holds it.
type concealed[T any] struct {
	mute
	reveal func() T
}

func conceal[T any](value T) concealed[T] { return concealed[T]{reveal: func() T { return value }} }

// value returns what was concealed, the zero value of T if nothing was.
func (c concealed[T]) value() (value T) {
	if c.reveal == nil {
		return value
	}
	return c.reveal()
}
