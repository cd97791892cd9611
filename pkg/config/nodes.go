package config

import (
	"fmt"
	"net/url"
	"slices"
	"strconv"
)

// sshPort is the one direct port where the stanza names none.
const sshPort = 22

// checkNodes reads what encryptNodes is about, and what it has in common with
// externalCIDRs, where other machines are reached through the tunnel too. The
// registry's ports are direct in any case: without them a node whose tunnel is
// broken could not hear what would mend it.
func checkNodes(c *Config, raw rawStanza) error {
	if c.EncryptNodes = raw.EncryptNodes; !c.EncryptNodes && len(c.ExternalCIDRs) == 0 {
		if raw.DirectPorts != nil {
			return &Error{"directPorts", "set without encryptNodes or externalCIDRs", `set "encryptNodes": true too, or leave directPorts out`}
		}
		return nil
	}
	ports := []int{sshPort}
	if raw.DirectPorts != nil {
		ports = *raw.DirectPorts
	}
	for _, p := range ports {
		if p < 1 || p > 65535 {
			return &Error{"directPorts", fmt.Sprintf("%d is out of range", p), "use TCP ports, 1 to 65535"}
		}
		c.DirectPorts = append(c.DirectPorts, uint16(p))
	}
	for _, e := range c.Registry.Etcd.Endpoints {
		if p := portOf(e); p != 0 {
			c.DirectPorts = append(c.DirectPorts, p)
		}
	}
	slices.Sort(c.DirectPorts)
	c.DirectPorts = slices.Compact(c.DirectPorts)
	return nil
}

// portOf is the port of a URL that checkRegistry has accepted.
func portOf(endpoint string) uint16 {
	u, err := url.Parse(endpoint)
	if err != nil {
		return 0
	}
	n, err := strconv.ParseUint(u.Port(), 10, 16)
	if err != nil {
		return 0
	}
	return uint16(n)
}
