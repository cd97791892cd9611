package operate

import (
	"bufio"
	"bytes"
	"context"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"os"
	"sync"
	"testing"
	"time"

	"github.com/wgcni/wgcni/test/cluster"
)

// browser is a headless Chromium inside of a machine, spoken to by the DevTools
// protocol (https://chromedevtools.github.io/devtools-protocol) over two pipes:
// requests and answers are JSON, each with a NUL at its end.
type browser struct {
	t       testing.TB
	to      *os.File
	session string

	mu        sync.Mutex
	last      int
	waiting   map[int]chan answer
	requests  []string // URLs that the page has asked for
	complains []string // of the console, and of the browser about the page
}

type answer struct {
	Result json.RawMessage
	Error  *struct{ Message string }
}

// browse starts a browser in a machine. It ends with the test.
func browse(t testing.TB, m *cluster.Machine) *browser {
	t.Helper()
	fromBrowser, out, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	in, toBrowser, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	cmd := m.Command(context.Background(), "chromium", "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
		"--disable-component-update", "--disable-sync", "--disable-dev-shm-usage", "--remote-debugging-pipe", "--user-data-dir="+t.TempDir(), "about:blank")
	cmd.ExtraFiles = []*os.File{in, out}
	process, err := cluster.StartCommand(cmd)
	in.Close()
	out.Close()
	if err != nil {
		t.Fatal(err)
	}
	b := &browser{t: t, to: toBrowser, waiting: map[int]chan answer{}}
	go b.listen(fromBrowser)
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
		defer cancel()
		b.send("", "Browser.close", nil) // so that it leaves none of its processes behind
		_ = process.Wait(ctx)
		_ = process.Kill()
		toBrowser.Close()
		fromBrowser.Close()
		if t.Failed() {
			t.Logf("chromium: %s", process.Log)
		}
	})
	var target struct{ TargetID string }
	b.call("Target.createTarget", map[string]any{"url": "about:blank"}, &target)
	var attached struct{ SessionID string }
	b.call("Target.attachToTarget", map[string]any{"targetId": target.TargetID, "flatten": true}, &attached)
	b.session = attached.SessionID
	for _, domain := range []string{"Page", "Runtime", "Log", "Network"} {
		b.call(domain+".enable", nil, nil)
	}
	return b
}

func (b *browser) listen(from *os.File) {
	for r := bufio.NewReader(from); ; {
		text, err := r.ReadBytes(0)
		if err != nil {
			return
		}
		var m struct {
			ID     int
			Method string
			Params json.RawMessage
			answer
		}
		if err := json.Unmarshal(bytes.TrimRight(text, "\x00"), &m); err != nil {
			continue
		}
		b.mu.Lock()
		switch waiting, asked := b.waiting[m.ID]; {
		case asked:
			delete(b.waiting, m.ID)
			waiting <- m.answer
		case m.Method == "Network.requestWillBeSent":
			var p struct{ Request struct{ URL string } }
			_ = json.Unmarshal(m.Params, &p)
			b.requests = append(b.requests, p.Request.URL)
		case m.Method == "Log.entryAdded", m.Method == "Runtime.exceptionThrown", m.Method == "Runtime.consoleAPICalled":
			b.complains = append(b.complains, string(m.Params))
		}
		b.mu.Unlock()
	}
}

func (b *browser) send(session, method string, params any) chan answer {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.last++
	done := make(chan answer, 1)
	b.waiting[b.last] = done
	message := map[string]any{"id": b.last, "method": method}
	if params != nil {
		message["params"] = params
	}
	if session != "" {
		message["sessionId"] = session
	}
	text, err := json.Marshal(message)
	if err != nil {
		panic(err)
	}
	_, _ = b.to.Write(append(text, 0)) // a browser that is gone does not answer
	return done
}

// call waits for the browser's answer.
func (b *browser) call(method string, params, result any) {
	b.t.Helper()
	select {
	case a := <-b.send(b.session, method, params):
		if a.Error != nil {
			b.t.Fatalf("%s: %s", method, a.Error.Message)
		}
		if result != nil {
			if err := json.Unmarshal(a.Result, result); err != nil {
				b.t.Fatalf("%s: %v in %s", method, err, a.Result)
			}
		}
	case <-time.After(cluster.Patience(30 * time.Second)):
		b.t.Fatalf("%s: the browser does not answer", method)
	}
}

// eval runs JavaScript in the page and returns its value as text.
func (b *browser) eval(script string) string {
	b.t.Helper()
	var out struct {
		Result struct{ Value any }
	}
	b.call("Runtime.evaluate", map[string]any{"expression": script, "awaitPromise": true, "returnByValue": true}, &out)
	return fmt.Sprint(out.Result.Value)
}

// open loads a page, as wide as so many pixels, for a light or a dark screen.
func (b *browser) open(url string, width int, scheme string) {
	b.t.Helper()
	b.call("Emulation.setDeviceMetricsOverride", map[string]any{"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}, nil)
	b.call("Emulation.setEmulatedMedia", map[string]any{"features": []any{map[string]any{"name": "prefers-color-scheme", "value": scheme}}}, nil)
	b.call("Page.navigate", map[string]any{"url": url}, nil)
	b.await("document.readyState == 'complete' && location.href.startsWith('http')")
}

// await waits until a condition is true in the page.
func (b *browser) await(condition string) {
	b.t.Helper()
	err := cluster.Poll(b.t.Context(), condition, func() error {
		if got := b.eval(condition); got != "true" {
			return fmt.Errorf("it is %s", got)
		}
		return nil
	})
	if err != nil {
		b.t.Fatal(err)
	}
}

// picture returns the whole page as PNG.
func (b *browser) picture() []byte {
	b.t.Helper()
	var shot struct{ Data string }
	b.call("Page.captureScreenshot", map[string]any{"format": "png", "captureBeyondViewport": true}, &shot)
	png, err := base64.StdEncoding.DecodeString(shot.Data)
	if err != nil {
		b.t.Fatal(err)
	}
	return png
}

// said returns the URLs that were asked for, and what the browser complained of.
func (b *browser) said() (requests, complains []string) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return append([]string(nil), b.requests...), append([]string(nil), b.complains...)
}
