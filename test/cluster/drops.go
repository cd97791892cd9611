package cluster

import (
	"fmt"
	"os"
	"strconv"
	"strings"
)

// udpDrops is how many datagrams the open sockets of a port have dropped, in
// either family, for want of room: the last column of /proc/net/udp.
func udpDrops(at Endpointer, port uint16) (drops int, err error) {
	err = at.Do(func() error {
		for _, file := range []string{"udp", "udp6"} {
			text, err := os.ReadFile("/proc/thread-self/net/" + file)
			if err != nil {
				return err
			}
			n, err := dropsOfPort(string(text), port)
			if err != nil {
				return fmt.Errorf("/proc/net/%s: %w", file, err)
			}
			drops += n
		}
		return nil
	})
	if err != nil {
		return 0, fmt.Errorf("count what the sockets of port %d of %s have dropped: %w", port, at, err)
	}
	return drops, nil
}

// dropsOfPort reads the table of sockets that the kernel prints (net/ipv4/udp.c,
// udp4_format_sock): the second column is the local address, the last the drops.
func dropsOfPort(table string, port uint16) (drops int, err error) {
	suffix := fmt.Sprintf(":%04X", port)
	for i, line := range strings.Split(strings.TrimSpace(table), "\n") {
		columns := strings.Fields(line)
		if i == 0 || len(columns) < 3 || !strings.HasSuffix(columns[1], suffix) {
			continue
		}
		n, err := strconv.Atoi(columns[len(columns)-1])
		if err != nil {
			return 0, err
		}
		drops += n
	}
	return drops, nil
}
