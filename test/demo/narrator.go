package main

import (
	"fmt"
	"os"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// narrator prints one line a step, and below it what the step has to show. On a
// terminal the line is alive until the step ends:
//
//	⠹  6  Let all pods talk to all: 84 of 180  1.2 s
//	✓  6  Let all pods talk to all: 180 of 180 exchanges  1.9 s
//
// Elsewhere it is plain ASCII, with a dot for each second.
type narrator struct {
	out      *os.File
	terminal bool
	colour   bool
	verbose  bool

	mu       sync.Mutex
	number   int
	title    string
	progress string
	details  []string
	start    time.Time

	ticking chan struct{} // closed at the end of a step
	ticked  sync.WaitGroup
}

func newNarrator(out *os.File, verbose bool) *narrator {
	_, err := unix.IoctlGetTermios(int(out.Fd()), unix.TCGETS)
	terminal := err == nil && os.Getenv("TERM") != "dumb" && speaksUTF8()
	return &narrator{out: out, terminal: terminal, colour: terminal && os.Getenv("NO_COLOR") == "", verbose: verbose}
}

// speaksUTF8 follows the order of locale(7).
func speaksUTF8() bool {
	for _, key := range []string{"LC_ALL", "LC_CTYPE", "LANG"} {
		if v := strings.ToUpper(os.Getenv(key)); v != "" {
			return strings.Contains(v, "UTF-8") || strings.Contains(v, "UTF8")
		}
	}
	return false
}

func (n *narrator) say(format string, args ...any) { fmt.Fprintf(n.out, format+"\n", args...) }

func (n *narrator) begin(number int, title string) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.number, n.title, n.progress, n.details, n.start = number, title, "", nil, time.Now()
	interval := time.Second
	if n.terminal {
		interval = 100 * time.Millisecond
		n.draw(0)
	} else {
		fmt.Fprintf(n.out, "%2d. %s ...", number, title)
	}
	n.ticking = make(chan struct{})
	n.ticked.Go(func() { n.tick(interval, n.ticking) })
}

func (n *narrator) tick(interval time.Duration, end <-chan struct{}) {
	ticker := time.NewTicker(interval)
	defer ticker.Stop()
	for frame := 1; ; frame++ {
		select {
		case <-end:
			return
		case <-ticker.C:
		}
		n.mu.Lock()
		if n.terminal {
			n.draw(frame)
		} else {
			fmt.Fprint(n.out, ".")
		}
		n.mu.Unlock()
	}
}

// draw writes the line of a step that is under way over itself.
func (n *narrator) draw(frame int) {
	spinner := []rune("⠋⠙⠹⠸⠼⠴⠦⠧⠇⠏")
	text := n.title
	if n.progress != "" {
		text += ": " + n.progress
	}
	if elapsed := time.Since(n.start); elapsed > time.Second {
		text += "  " + seconds(elapsed)
	}
	line := []rune(fmt.Sprintf("%c %2d  %s", spinner[frame%len(spinner)], n.number, text))
	// A line that wraps could not be written over.
	if size, err := unix.IoctlGetWinsize(int(n.out.Fd()), unix.TIOCGWINSZ); err == nil && int(size.Col) > 0 {
		line = line[:min(len(line), int(size.Col)-1)]
	}
	fmt.Fprintf(n.out, "\r%s\x1b[K", string(line))
}

// working says how far the step is. It is shown on a terminal only.
func (n *narrator) working(format string, args ...any) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.progress = fmt.Sprintf(format, args...)
}

// show adds lines below the step's.
func (n *narrator) show(text string) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.details = append(n.details, text)
}

// showMore adds lines that only --verbose prints.
func (n *narrator) showMore(text string) {
	if n.verbose {
		n.show(text)
	}
}

func (n *narrator) end(fact string, err error) {
	close(n.ticking)
	n.ticked.Wait()
	n.mu.Lock()
	defer n.mu.Unlock()
	took := seconds(time.Since(n.start))
	switch {
	case n.terminal && err == nil:
		fmt.Fprintf(n.out, "\r%s %2d  %s: %s  %s\x1b[K\n", n.paint("32", "✓"), n.number, n.title, n.paint("1", fact), n.paint("2", took))
	case n.terminal:
		fmt.Fprintf(n.out, "\r%s %2d  %s  %s\x1b[K\n", n.paint("31", "✗"), n.number, n.title, n.paint("2", took))
	case err == nil:
		fmt.Fprintf(n.out, " ok: %s (%s)\n", fact, took)
	default:
		fmt.Fprintf(n.out, " FAILED (%s)\n", took)
	}
	for _, text := range n.details {
		fmt.Fprint(n.out, indent(text))
	}
}

func (n *narrator) paint(code, text string) string {
	if !n.colour {
		return text
	}
	return "\x1b[" + code + "m" + text + "\x1b[0m"
}

func seconds(d time.Duration) string { return fmt.Sprintf("%.1f s", d.Seconds()) }

// indent puts text below a step's title.
func indent(text string) string {
	var b strings.Builder
	for line := range strings.Lines(strings.TrimRight(text, "\n") + "\n") {
		if strings.TrimSpace(line) != "" {
			b.WriteString("      ")
		}
		b.WriteString(line)
	}
	return b.String()
}
