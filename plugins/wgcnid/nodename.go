package main

import (
	"bytes"
	"encoding/json"
	"fmt"
	"slices"
)

// nodeNameEnv is where a DaemonSet tells its pods the name of their node.
const nodeNameEnv = "NODE_NAME"

// withNodeName adds a node's name to an entry that has none. The helper has it from
// its environment; the runtime, which starts the plugin, has not, and the host name
// that the plugin would go by may be another: the node would then take its own
// record for a peer's.
func withNodeName(entry []byte, name string) ([]byte, error) {
	var keys map[string]json.RawMessage
	if err := json.Unmarshal(entry, &keys); err != nil {
		return nil, err
	}
	if _, there := keys["nodeName"]; there || name == "" || len(keys) == 0 {
		return entry, nil
	}
	rest := bytes.TrimLeft(entry[1:], " \t\r\n")
	space := entry[1 : len(entry)-len(rest)]
	comma := ", "
	if bytes.ContainsRune(space, '\n') {
		comma = "," + string(space)
	}
	return slices.Concat([]byte{'{'}, space, fmt.Appendf(nil, "\"nodeName\": %q%s", name, comma), rest), nil
}
