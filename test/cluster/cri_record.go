package cluster

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
)

// RecordPlugin is the type of a CNI plugin that does nothing but write down what it
// is told; see [Node.AddRecordPlugin]. Since detaching goes through a chain from its
// end, and stops where a plugin fails, it knows of the DELs that those behind it
// have served.
const RecordPlugin = "record"

// recordFile is where a node's recorder writes: what was recorded ends with the boot.
const recordFile = "/run/cni-verbs"

// recordScript answers an ADD with prevResult, which libcni gives compact and with
// sorted keys (libcni/conf.go, InjectConf).
const recordScript = `#!/bin/sh
conf=$(cat)
case $conf in *'"prevResult":'*) prev=yes ;; *) prev=no ;; esac
[ "$CNI_COMMAND" = VERSION ] || echo "$CNI_COMMAND,$CNI_CONTAINERID,$CNI_NETNS,$prev" >>` + recordFile + `
case $CNI_COMMAND in
ADD) printf '%s' "$conf" | sed 's/.*"prevResult":\(.*\),"type":"` + RecordPlugin + `"}$/\1/' ;;
VERSION) echo '{"cniVersion":"1.1.0","supportedVersions":["0.4.0","1.0.0","1.1.0"]}' ;;
esac
`

// Verb is a call that the recorder has seen.
type Verb struct {
	Command     string // ADD, DEL, STATUS, ...
	ContainerID string
	Netns       string // path inside the node; empty when the caller named none
	PrevResult  bool   // the caller had one
}

// AddRecordPlugin puts the recorder beside the plugins of a containerd.
func (n *Node) AddRecordPlugin() error {
	return n.WriteFile(filepath.Join(RuntimeBinDir, RecordPlugin), recordScript, 0o755)
}

// Verbs are the calls of this boot, in their order.
func (n *Node) Verbs() ([]Verb, error) {
	text, err := n.ReadFile(recordFile)
	if errors.Is(err, os.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	var verbs []Verb
	for line := range strings.Lines(text) {
		f := strings.Split(strings.TrimSpace(line), ",")
		if len(f) != 4 {
			return nil, fmt.Errorf("the recorder of %s wrote %q", n.Name, line)
		}
		verbs = append(verbs, Verb{Command: f[0], ContainerID: f[1], Netns: strings.Replace(f[2], "/var/run/", "/run/", 1), PrevResult: f[3] == "yes"})
	}
	return verbs, nil
}
