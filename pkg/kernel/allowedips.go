package kernel

import (
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"strings"
	"time"

	"github.com/mdlayher/genetlink"
	mdnetlink "github.com/mdlayher/netlink"
	"go4.org/netipx"
	"golang.org/x/sys/unix"
	"golang.zx2c4.com/wireguard/wgctrl/wgtypes"

	"github.com/wgcni/wgcni/pkg/mesh"
)

// Attributes of <linux/wireguard.h> that golang.org/x/sys/unix lacks.
const (
	wgAllowedIPFlags    = 4      // WGALLOWEDIP_A_FLAGS, kernel 6.16
	wgAllowedIPRemoveMe = 1 << 0 // WGALLOWEDIP_F_REMOVE_ME
)

// removal is a way to take single allowed IPs from a peer.
type removal string

const (
	byUAPI  removal = "by UAPI"
	byFlag  removal = "by flag"
	byDecoy removal = "by decoy"
)

// removeAllowedIPs takes single allowed IPs from a peer, and leaves the others
// in place the whole time: replacing the list would empty it for a moment, and
// sends would fail (cilium PR 34612).
//
// Three ways, by what there is: userspace WireGuard takes "-prefix"; a kernel
// from 6.16 on has a flag for it; to an older kernel the prefix is handed to a
// peer made up for the purpose, which is then deleted with it. It returns which
// one was taken.
func (k *Kernel) removeAllowedIPs(o mesh.SetPeer) (removal, error) {
	d, err := k.wg.device(o.Link)
	if err != nil {
		return "", err
	}
	if d.Type == wgtypes.Userspace {
		return byUAPI, removeByUAPI(o)
	}
	err = removeByFlag(o)
	// EINVAL: strict attribute validation of a kernel that lacks the flag.
	if errors.Is(err, unix.EINVAL) || errors.Is(err, unix.EOPNOTSUPP) {
		return byDecoy, k.removeByDecoy(o)
	}
	return byFlag, err
}

// uapiTimeout bounds a conversation with the tunnel process.
const uapiTimeout = 5 * time.Second

func removeByUAPI(o mesh.SetPeer) error {
	conn, err := net.DialTimeout("unix", "/var/run/wireguard/"+o.Link+".sock", uapiTimeout)
	if err != nil {
		return err
	}
	defer conn.Close()
	if err := conn.SetDeadline(time.Now().Add(uapiTimeout)); err != nil {
		return err
	}
	var b strings.Builder
	fmt.Fprintf(&b, "set=1\npublic_key=%s\nupdate_only=true\n", hex.EncodeToString(o.PublicKey[:]))
	for _, p := range o.Remove {
		fmt.Fprintf(&b, "allowed_ip=-%s\n", p)
	}
	if _, err := io.WriteString(conn, b.String()+"\n"); err != nil {
		return err
	}
	answer := make([]byte, 64)
	n, err := conn.Read(answer)
	if err != nil {
		return err
	}
	if got := strings.TrimSpace(string(answer[:n])); got != "errno=0" {
		return fmt.Errorf("the tunnel process answered %s", got)
	}
	return nil
}

// allowedIPsPerMessage keeps a message well below 64 KiB, netlink's limit for an attribute.
const allowedIPsPerMessage = 512

func removeByFlag(o mesh.SetPeer) error {
	c, err := genetlink.Dial(&mdnetlink.Config{Strict: true})
	if err != nil {
		return err
	}
	defer c.Close()
	family, err := c.GetFamily(unix.WG_GENL_NAME)
	if err != nil {
		return err
	}
	for rest := o.Remove; len(rest) > 0; {
		n := min(len(rest), allowedIPsPerMessage)
		data, err := encodeRemoval(o.Link, o.PublicKey, rest[:n])
		if err != nil {
			return err
		}
		msg := genetlink.Message{
			Header: genetlink.Header{Command: unix.WG_CMD_SET_DEVICE, Version: unix.WG_GENL_VERSION},
			Data:   data,
		}
		if _, err := c.Execute(msg, family.ID, mdnetlink.Request|mdnetlink.Acknowledge); err != nil {
			return err
		}
		rest = rest[n:]
	}
	return nil
}

func encodeRemoval(link string, key wgtypes.Key, prefixes []netip.Prefix) ([]byte, error) {
	ae := mdnetlink.NewAttributeEncoder()
	ae.String(unix.WGDEVICE_A_IFNAME, link)
	ae.Nested(unix.WGDEVICE_A_PEERS, func(peers *mdnetlink.AttributeEncoder) error {
		peers.Nested(0, func(peer *mdnetlink.AttributeEncoder) error {
			peer.Bytes(unix.WGPEER_A_PUBLIC_KEY, key[:])
			peer.Uint32(unix.WGPEER_A_FLAGS, unix.WGPEER_F_UPDATE_ONLY)
			peer.Nested(unix.WGPEER_A_ALLOWEDIPS, func(ips *mdnetlink.AttributeEncoder) error {
				for i, p := range prefixes {
					ips.Nested(uint16(i), func(ip *mdnetlink.AttributeEncoder) error {
						family := uint16(unix.AF_INET)
						if p.Addr().Is6() {
							family = unix.AF_INET6
						}
						ip.Uint16(unix.WGALLOWEDIP_A_FAMILY, family)
						ip.Bytes(unix.WGALLOWEDIP_A_IPADDR, p.Addr().AsSlice())
						ip.Uint8(unix.WGALLOWEDIP_A_CIDR_MASK, uint8(p.Bits()))
						ip.Uint32(wgAllowedIPFlags, wgAllowedIPRemoveMe)
						return nil
					})
				}
				return nil
			})
			return nil
		})
		return nil
	})
	return ae.Encode()
}

func (k *Kernel) removeByDecoy(o mesh.SetPeer) error {
	key, err := wgtypes.GeneratePrivateKey()
	if err != nil {
		return err
	}
	decoy := key.PublicKey()
	take := wgtypes.PeerConfig{PublicKey: decoy}
	for _, p := range o.Remove {
		take.AllowedIPs = append(take.AllowedIPs, *netipx.PrefixIPNet(p))
	}
	if err := k.wg.configure(o.Link, wgtypes.Config{Peers: []wgtypes.PeerConfig{take}}); err != nil {
		return err
	}
	return k.wg.configure(o.Link, wgtypes.Config{Peers: []wgtypes.PeerConfig{{PublicKey: decoy, Remove: true, UpdateOnly: true}}})
}
