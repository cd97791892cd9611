package main

import (
	"encoding/json"
	"fmt"
	"io"
	"strings"
	"unicode"
	"unicode/utf16"
)

// printable makes text harmless to a terminal: what is not printable, but for
// the end of a line, is shown in the form \u001b. Whoever can write to the
// registry chooses the names that errors quote, and a name may hold orders to
// the terminal (ECMA-48; the C1 ones are no ASCII) or turn the text around
// (U+202E). JSON stays the same value: outside of its strings all is printable.
func printable(text string) string {
	var b strings.Builder
	for _, r := range text { // bytes that are no UTF-8 become U+FFFD
		switch high, low := utf16.EncodeRune(r); {
		case r == '\n' || unicode.IsPrint(r):
			b.WriteRune(r)
		case high == unicode.ReplacementChar: // it needs no pair
			fmt.Fprintf(&b, `\u%04x`, r)
		default:
			fmt.Fprintf(&b, `\u%04x\u%04x`, high, low)
		}
	}
	return b.String()
}

// oneLine fits an error into a line of its own: not several, and not a megabyte.
func oneLine(text string) string {
	const most = 600
	text = strings.Join(strings.Split(strings.TrimSpace(text), "\n"), "; ")
	if runes := []rune(text); len(runes) > most {
		text = string(runes[:most]) + "..."
	}
	return text
}

// printJSON prints what scripts read.
func printJSON(w io.Writer, value any) error {
	text, err := json.MarshalIndent(value, "", "  ")
	if err != nil {
		return err
	}
	_, err = io.WriteString(w, printable(string(text))+"\n")
	return err
}
