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

// Stream sends numbered datagrams to a [Server] at a steady rate.
type Stream struct {
	conn   net.Conn
	cancel context.CancelFunc
	sent   chan struct{} // closed when the sender has ended
	read   chan struct{} // closed when the receiver has ended

	mu       sync.Mutex
	report   StreamReport
	received []bool // by sequence number
	last     time.Time
	lastSent time.Time
}

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
	s := &Stream{conn: conn, cancel: cancel, sent: make(chan struct{}), read: make(chan struct{}), last: time.Now()}
	go s.send(ctx, o)
	go s.receive()
	return s, nil
}

// send keeps the rate on average: datagrams that are late go out at once.
func (s *Stream) send(ctx context.Context, o StreamOptions) {
	defer close(s.sent)
	b := make([]byte, max(o.Size, 8))
	start := time.Now()
	timer := time.NewTimer(0)
	defer timer.Stop()
	for seq := uint64(0); ; seq++ {
		timer.Reset(time.Until(start.Add(time.Duration(seq) * time.Second / time.Duration(o.Rate))))
		select {
		case <-ctx.Done():
			return
		case <-timer.C:
		}
		s.mu.Lock()
		s.received = append(s.received, false)
		s.report.Sent++
		s.lastSent = time.Now()
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
	if seq >= uint64(len(s.received)) {
		return // not ours
	}
	if s.received[seq] {
		s.report.Duplicates++
		return
	}
	s.received[seq] = true
	s.report.Received++
	s.report.LongestGap = max(s.report.LongestGap, now.Sub(s.last))
	s.last = now
}

// Report returns the state so far; datagrams under way count as lost.
func (s *Stream) Report() StreamReport {
	s.mu.Lock()
	defer s.mu.Unlock()
	r := s.report
	r.Lost = r.Sent - r.Received
	r.LongestGap = max(r.LongestGap, s.lastSent.Sub(s.last))
	return r
}

// Stop ends the stream and waits for the answers under way: up to a second of [Patience].
func (s *Stream) Stop() StreamReport {
	s.cancel()
	<-s.sent
	ctx, cancel := context.WithTimeout(context.Background(), Patience(time.Second))
	defer cancel()
	// That some never come is what the report says.
	_ = Poll(ctx, "the last answers", func() error {
		if r := s.Report(); r.Lost > r.SendErrors {
			return fmt.Errorf("%d are missing", r.Lost)
		}
		return nil
	})
	_ = s.conn.Close()
	<-s.read
	return s.Report()
}
