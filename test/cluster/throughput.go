package cluster

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"strconv"
	"time"
)

// ThroughputOptions describe a measurement of TCP throughput.
type ThroughputOptions struct {
	Duration time.Duration // required; whole seconds
	Warmup   time.Duration // optional: left out at the start; whole seconds
	Streams  int           // optional: parallel connections; 1 by default
	Port     uint16        // optional: 5201 by default
}

// ThroughputReport is what iperf3's receiver measured.
type ThroughputReport struct {
	BytesPerSecond float64
	Retransmits    int
	MSS            int // bytes of payload in a segment
	Raw            string
}

// Throughput measures TCP from client to server with iperf3, whose processes
// keep the harness out of the figures. The address is the server's.
func Throughput(ctx context.Context, client, server Executor, to netip.Addr, o ThroughputOptions) (ThroughputReport, error) {
	r, err := throughput(ctx, client, server, to, o)
	if err != nil {
		return r, fmt.Errorf("measure throughput from %s to %s (%s): %w", client, server, to, err)
	}
	return r, nil
}

func throughput(ctx context.Context, client, server Executor, to netip.Addr, o ThroughputOptions) (r ThroughputReport, err error) {
	ctx, cancel := withDefaultTimeout(ctx, o.Duration+o.Warmup+startTimeout)
	defer cancel()
	port := "5201"
	if o.Port != 0 {
		port = strconv.Itoa(int(o.Port))
	}
	srv, err := StartCommand(server.Command(ctx, "iperf3", "--server", "--one-off", "--forceflush", "--port", port))
	if err != nil {
		return r, err
	}
	defer func() { err = errors.Join(err, srv.Kill()) }()
	if err := srv.WaitFor(ctx, "Server listening"); err != nil {
		return r, err
	}
	r.Raw, err = output(client.Command(ctx, "iperf3", "--json", "--client", to.String(), "--port", port,
		"--time", seconds(o.Duration), "--omit", seconds(o.Warmup), "--parallel", strconv.Itoa(max(o.Streams, 1))))
	if err != nil {
		return r, err
	}
	var report struct {
		Start struct {
			MSS int `json:"tcp_mss_default"`
		} `json:"start"`
		End struct {
			Sent struct {
				Retransmits int `json:"retransmits"`
			} `json:"sum_sent"`
			Received struct {
				BitsPerSecond float64 `json:"bits_per_second"`
			} `json:"sum_received"`
		} `json:"end"`
		Error string `json:"error"`
	}
	if err := json.Unmarshal([]byte(r.Raw), &report); err != nil {
		return r, fmt.Errorf("parse iperf3's report: %w: %s", err, r.Raw)
	}
	if report.Error != "" {
		return r, errors.New(report.Error)
	}
	r.BytesPerSecond = report.End.Received.BitsPerSecond / 8
	r.Retransmits, r.MSS = report.End.Sent.Retransmits, report.Start.MSS
	return r, nil
}

func seconds(d time.Duration) string { return strconv.Itoa(int(d.Round(time.Second).Seconds())) }
