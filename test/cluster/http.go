package cluster

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
)

// HelperHTTP is where `wgcnid run` serves unless it is told otherwise.
const HelperHTTP = "127.0.0.1:51822"

// HTTP returns a client whose connections are made inside a network namespace, to
// addresses.
func HTTP(from Endpointer) *http.Client {
	return &http.Client{Transport: &http.Transport{
		DisableKeepAlives: true,
		DialContext: func(ctx context.Context, network, address string) (net.Conn, error) {
			to, err := netip.ParseAddrPort(address)
			if err != nil {
				return nil, err
			}
			return Dial(ctx, from, network, to)
		},
	}}
}

// Get asks the node's helper for a path, and returns its answer's status and body.
func (n *Node) Get(ctx context.Context, path string) (status int, body string, err error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+HelperHTTP+path, nil)
	if err != nil {
		return 0, "", err
	}
	answer, err := HTTP(n).Do(req)
	if err != nil {
		return 0, "", fmt.Errorf("%s of %s: %w", path, n.Name, err)
	}
	defer answer.Body.Close()
	text, err := io.ReadAll(answer.Body)
	return answer.StatusCode, string(text), err
}
