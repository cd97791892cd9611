package main

import (
	"fmt"
	"image/color"
	"io"
	"strings"

	"github.com/boombuler/barcode/qr"
)

// quiet is the margin that a reader needs around the code, in modules (ISO/IEC 18004).
const quiet = 4

// printQR draws a text for a phone's camera, two rows of modules a line. The colours
// are set: a reader wants dark on light, whatever the terminal's are.
func printQR(w io.Writer, text string) error {
	code, err := qr.Encode(text, qr.L, qr.Unicode)
	if err != nil {
		return fmt.Errorf("draw a QR code of %d bytes: %w", len(text), err)
	}
	size := code.Bounds().Dx()
	light := func(x, y int) bool {
		if x < 0 || y < 0 || x >= size || y >= size {
			return true
		}
		level, _ := color.GrayModel.Convert(code.At(x, y)).(color.Gray)
		return level.Y > 127
	}
	var b strings.Builder
	for y := -quiet; y < size+quiet; y += 2 {
		b.WriteString("\x1b[97;40m") // bright white on black
		for x := -quiet; x < size+quiet; x++ {
			switch upper, lower := light(x, y), light(x, y+1); {
			case upper && lower:
				b.WriteRune('█')
			case upper:
				b.WriteRune('▀')
			case lower:
				b.WriteRune('▄')
			default:
				b.WriteRune(' ')
			}
		}
		b.WriteString("\x1b[0m\n")
	}
	_, err = io.WriteString(w, b.String())
	return err
}
