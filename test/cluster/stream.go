package cluster

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"sync"
	"time"
)

// StreamOptions describe a steady stream of datagrams.
type StreamOptions struct {
	Rate int // required: datagrams per second
	Size int // optional: payload in bytes; 64 by default, at least 8
}

// StreamReport is what became of a stream. A datagram was received when the
// server's answer came back, so a loss in either direction counts.
type StreamReport struct {
	Sent       int // attempts
	Received   int
	Lost       int // Sent - Received
	UnderWay   int // of Lost: sent less than a second ago, so that they may still come
	Duplicates int
	SendErrors int   // of Sent; such datagrams are lost as well
	FirstError error // the first of these, or nil
	// LongestGap is the longest time without an answer, between the first
	// datagram and the last answer (the last datagram, if it was lost).
	LongestGap time.Duration
}

// String is the report in one line.
func (r StreamReport) String() string {
	s := fmt.Sprintf("sent %d, received %d, lost %d, duplicates %d, longest gap %v",
		r.Sent, r.Received, r.Lost, r.Duplicates, r.LongestGap.Round(time.Millisecond))
	if r.SendErrors > 0 {
		s += fmt.Sprintf(", %d not sent: %v", r.SendErrors, r.FirstError)
	}
	return s
}

// Loss is a row of datagrams that have no answer.
type Loss struct {
	First uint64 // its number
	Count int
	Sent  time.Time // when the first of them was sent, to the millisecond
}

// String tells the moment by the clock of the day.
func (l Loss) String() string {
	return fmt.Sprintf("%d from number %d on, sent at %s", l.Count, l.First, l.Sent.Format("15:04:05.000"))
}

// Stream sends numbered datagrams to a [Server] at a steady rate.
type Stream struct {
	from   Endpointer
	conn   net.Conn
	cancel context.CancelFunc
	sent   chan struct{} // closed when the sender has ended
	read   chan struct{} // closed when the receiver has ended

	mu       sync.Mutex
	report   StreamReport
	start    time.Time
	sentAt   []uint32 // by sequence number: milliseconds since the start; answered when it came back
	base     uint64   // what was sent before this one is not reported
	last     time.Time
	lastSent time.Time
}

// answered is in the place of the time when a datagram was sent that has come back.
const answered = ^uint32(0)

// StartStream starts a stream. Stop ends it.
func StartStream(from Endpointer, to netip.AddrPort, o StreamOptions) (*Stream, error) {
	if o.Rate <= 0 {
		return nil, fmt.Errorf("start a stream from %s to %s: a rate of %d is not positive", from, to, o.Rate)
	}
	if o.Size == 0 {
		o.Size = 64
	}
	ctx, cancel := context.WithCancel(context.Background())
	conn, err := Dial(ctx, from, "udp", to)
	if err != nil {
		cancel()
		return nil, err
	}
	now := time.Now()
	s := &Stream{from: from, conn: conn, cancel: cancel, sent: make(chan struct{}), read: make(chan struct{}), start: now, last: now}
	go s.send(ctx, o)
	go s.receive()
	return s, nil
}

// send keeps the rate on average: datagrams that are late go out at once.
func (s *Stream) send(ctx context.Context, o StreamOptions) {
	defer close(s.sent)
	b := make([]byte, max(o.Size, 8))
	timer := time.NewTimer(0)
	defer timer.Stop()
	for seq := uint64(0); ; seq++ {
		timer.Reset(time.Until(s.start.Add(time.Duration(seq) * time.Second / time.Duration(o.Rate))))
		select {
		case <-ctx.Done():
			return
		case <-timer.C:
		}
		s.mu.Lock()
		s.report.Sent++
		s.lastSent = time.Now()
		s.sentAt = append(s.sentAt, uint32(s.lastSent.Sub(s.start).Milliseconds()))
		s.mu.Unlock()
		binary.BigEndian.PutUint64(b, seq)
		if _, err := s.conn.Write(b); err != nil {
			s.mu.Lock()
			s.report.SendErrors++
			if s.report.FirstError == nil {
				s.report.FirstError = err
			}
			s.mu.Unlock()
		}
	}
}

func (s *Stream) receive() {
	defer close(s.read)
	buf := make([]byte, 1<<16)
	for {
		n, err := s.conn.Read(buf)
		if errors.Is(err, net.ErrClosed) {
			return
		}
		if err != nil {
			continue // an ICMP error for an earlier datagram
		}
		_, payload, err := parseReply(buf[:n])
		if err != nil || len(payload) < 8 {
			continue
		}
		s.count(binary.BigEndian.Uint64(payload), time.Now())
	}
}

func (s *Stream) count(seq uint64, now time.Time) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if seq >= uint64(len(s.sentAt)) || seq < s.base {
		return // not ours, or of before
	}
	if s.sentAt[seq] == answered {
		s.report.Duplicates++
		return
	}
	s.sentAt[seq] = answered
	s.report.Received++
	s.report.LongestGap = max(s.report.LongestGap, now.Sub(s.last))
	s.last = now
}

// Reset makes the report one of the datagrams that are sent from now on.
func (s *Stream) Reset() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.report, s.base, s.last = StreamReport{}, uint64(len(s.sentAt)), time.Now()
	s.lastSent = s.last
}

// mayCome is how long an answer may take, on a machine that has other things to do.
var mayCome = Patience(time.Second)

// Report returns the state so far; datagrams under way count as lost.
func (s *Stream) Report() StreamReport {
	s.mu.Lock()
	defer s.mu.Unlock()
	r := s.report
	r.Lost = r.Sent - r.Received
	r.LongestGap = max(r.LongestGap, s.lastSent.Sub(s.last))
	recent := time.Since(s.start) - mayCome
	for seq := len(s.sentAt) - 1; seq >= int(s.base); seq-- {
		at := s.sentAt[seq]
		if at == answered {
			continue
		}
		if time.Duration(at)*time.Millisecond < recent {
			break
		}
		r.UnderWay++
	}
	return r
}

// Losses are the datagrams without an answer so far, the first limit rows of them.
func (s *Stream) Losses(limit int) (rows []Loss) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for seq := s.base; seq < uint64(len(s.sentAt)); seq++ {
		if s.sentAt[seq] == answered {
			continue
		}
		if n := len(rows); n > 0 && rows[n-1].First+uint64(rows[n-1].Count) == seq {
			rows[n-1].Count++
			continue
		}
		if len(rows) == limit {
			break
		}
		rows = append(rows, Loss{First: seq, Count: 1, Sent: s.start.Add(time.Duration(s.sentAt[seq]) * time.Millisecond)})
	}
	return rows
}

// Overflowed is how many answers this end's socket had no room for, since nobody
// read them in time: the harness has lost these, and not the network. It can be
// asked until Stop.
func (s *Stream) Overflowed() (int, error) {
	return udpDrops(s.from, uint16(s.conn.LocalAddr().(*net.UDPAddr).Port))
}

// Stop ends the stream and waits for the answers under way, until none is missing
// or none has come for a second of [Patience].
func (s *Stream) Stop() StreamReport {
	s.cancel()
	<-s.sent
	ctx, cancel := context.WithTimeout(context.Background(), 10*mayCome)
	defer cancel()
	// That some never come is what the report says.
	_ = Poll(ctx, "the last answers", func() error {
		r := s.Report()
		s.mu.Lock()
		quiet := min(time.Since(s.last), time.Since(s.lastSent))
		s.mu.Unlock()
		if r.Lost > r.SendErrors && quiet < mayCome {
			return fmt.Errorf("%d are missing", r.Lost)
		}
		return nil
	})
	_ = s.conn.Close()
	<-s.read
	return s.Report()
}
