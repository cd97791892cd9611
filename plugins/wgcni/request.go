package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/containernetworking/cni/pkg/skel"
	"github.com/containernetworking/cni/pkg/types"
	current "github.com/containernetworking/cni/pkg/types/100"
	"github.com/containernetworking/cni/pkg/version"

	"github.com/wgcni/wgcni/pkg/config"
	"github.com/wgcni/wgcni/pkg/kernel"
	"github.com/wgcni/wgcni/pkg/mesh"
	"github.com/wgcni/wgcni/pkg/store"
)

// request is what ADD and CHECK are asked, parsed and validated.
type request struct {
	conf   config.Config
	result *current.Result  // of the plugins before this one
	at     store.Attachment // the pod, as it is to be recorded
}

func readRequest(args *skel.CmdArgs) (r request, err error) {
	if r.conf, err = config.Parse(args.StdinData); err != nil {
		return r, err
	}
	if r.result, err = prevResult(args.StdinData); err != nil {
		return r, err
	}
	r.at, err = attachment(r.conf, args, r.result)
	return r, err
}

// prevResult is the result of the plugins before this one.
func prevResult(stdin []byte) (*current.Result, error) {
	var conf types.PluginConf
	if err := json.Unmarshal(stdin, &conf); err != nil {
		return nil, faultf(types.ErrDecodingFailure, "", fmt.Errorf("read the network configuration: %w", err))
	}
	if err := version.ParsePrevResult(&conf); err != nil {
		return nil, faultf(types.ErrDecodingFailure, "", fmt.Errorf("prevResult: %w", err))
	}
	if conf.PrevResult == nil {
		return nil, faultf(types.ErrInvalidNetworkConfig, "put it after the primary plugin in the list",
			errors.New("prevResult: missing: wgcni is a chained plugin and gives no pod its address"))
	}
	result, err := current.NewResultFromResult(conf.PrevResult)
	if err != nil {
		return nil, faultf(types.ErrDecodingFailure, "", fmt.Errorf("prevResult: %w", err))
	}
	return result, nil
}

// attachment takes the pod's addresses on args.IfName from the result.
func attachment(conf config.Config, args *skel.CmdArgs, result *current.Result) (store.Attachment, error) {
	at := store.Attachment{
		Network: conf.Name, ContainerID: args.ContainerID, IfName: args.IfName,
		Sandbox: args.Netns, SandboxID: kernel.SandboxID(args.Netns), Pod: podName(args.Args), Since: mesh.ClaimTime(time.Now()),
	}
	inCluster := func(a netip.Addr) bool {
		return slices.ContainsFunc(conf.Bounds().Claimable(), func(p netip.Prefix) bool { return p.Contains(a) })
	}
	var outside []string
	for _, a := range store.ResultAddresses(result, args.IfName) {
		if inCluster(a) {
			at.Addresses = append(at.Addresses, a)
		} else {
			outside = append(outside, a.String())
		}
	}
	switch {
	case len(at.Addresses) == 0 && len(outside) == 0:
		return at, faultf(types.ErrInvalidNetworkConfig, "give the primary plugin an ipam section",
			fmt.Errorf("prevResult: the primary plugin gave %s no address", args.IfName))
	case len(at.Addresses) == 0 && conf.Encryption == mesh.Required:
		return at, faultf(types.ErrInvalidNetworkConfig, "add the pods' range to clusterCIDRs, or chain wgcni to another network",
			fmt.Errorf("clusterCIDRs: %v has none of the pod's addresses %s, so that nothing of this pod would be encrypted", conf.ClusterCIDRs, strings.Join(outside, ", ")))
	case len(outside) > 0:
		warn("pod %s: %s is not inside clusterCIDRs %v and stays unencrypted", args.ContainerID, strings.Join(outside, ", "), conf.ClusterCIDRs)
	}
	return at, nil
}

// podName is namespace/name as Kubernetes runtimes pass it in CNI_ARGS.
func podName(args string) string {
	values := map[string]string{}
	for pair := range strings.SplitSeq(args, ";") {
		key, value, _ := strings.Cut(pair, "=")
		values[key] = value
	}
	if values["K8S_POD_NAME"] == "" {
		return ""
	}
	return values["K8S_POD_NAMESPACE"] + "/" + values["K8S_POD_NAME"]
}
