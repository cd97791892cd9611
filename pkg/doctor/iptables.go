package doctor

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"os/exec"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// readLegacy reads the rules of the old iptables, which nftables does not show. Its
// kernel half is asked through the program itself, and only where it is in use: to
// ask would load it.
func readLegacy(ctx context.Context) (Ruleset, error) {
	var out Ruleset
	for _, f := range []struct{ family, names, save string }{
		{"ip", "/proc/net/ip_tables_names", "iptables-legacy-save"},
		{"ip6", "/proc/net/ip6_tables_names", "ip6tables-legacy-save"},
	} {
		names, err := os.ReadFile(f.names)
		if errors.Is(err, fs.ErrNotExist) || err == nil && strings.TrimSpace(string(names)) == "" {
			continue
		}
		if err != nil {
			return out, err
		}
		text, err := exec.CommandContext(ctx, f.save).Output()
		if err != nil {
			out.Unread = fmt.Sprintf("the old iptables is in use (%s) and %s does not tell its rules: %v", f.names, f.save, err)
			continue
		}
		out.Chains = append(out.Chains, parseSave(f.family, string(text))...)
	}
	return out, nil
}

// The hooks of iptables' chains, and the priorities of its tables
// (NF_IP_PRI_* in linux/netfilter_ipv4.h).
var (
	legacyHooks = map[string]string{
		"PREROUTING": HookPrerouting, "INPUT": HookInput, "FORWARD": HookForward, "OUTPUT": HookOutput, "POSTROUTING": HookPostrouting,
	}
	legacyPriorities = map[string]int{"raw": -300, "mangle": -150, "nat": -100, "filter": 0, "security": 50}
)

// parseSave reads what iptables-save prints.
func parseSave(family, text string) (out []Chain) {
	table, index := "", map[string]int{}
	for lines := bufio.NewScanner(strings.NewReader(text)); lines.Scan(); {
		line := lines.Text()
		switch {
		case strings.HasPrefix(line, "*"):
			table = line[1:]
			index = map[string]int{}
		case strings.HasPrefix(line, ":"):
			fields := append(strings.Fields(line[1:]), "", "")
			index[fields[0]] = len(out)
			out = append(out, Chain{
				Backend: backendLegacy, Family: family, Table: table, Name: fields[0],
				Hook: legacyHooks[fields[0]], Priority: legacyPriorities[table], Drops: fields[1] == "DROP",
			})
		case strings.HasPrefix(line, "-A "):
			words := splitWords(line)
			if len(words) < 2 {
				continue
			}
			if i, ok := index[words[1]]; ok {
				out[i].Rules = append(out[i].Rules, parseRule(words[2:], line))
			}
		}
	}
	return out
}

// splitWords splits at spaces, but for those in quotes.
func splitWords(line string) (out []string) {
	var word strings.Builder
	quoted, any := false, false
	for i := 0; i < len(line); i++ {
		switch c := line[i]; {
		case c == '\\' && quoted && i+1 < len(line):
			i++
			word.WriteByte(line[i])
		case c == '"':
			quoted, any = !quoted, true
		case c == ' ' && !quoted:
			if word.Len() > 0 || any {
				out = append(out, word.String())
			}
			word.Reset()
			any = false
		default:
			word.WriteByte(c)
		}
	}
	if word.Len() > 0 || any {
		out = append(out, word.String())
	}
	return out
}

// parseRule understands the common matches; what it does not understand may match
// or not.
func parseRule(words []string, line string) Rule {
	r := Rule{Text: line}
	var conditions []func(Packet) Tri
	var verdict Verdict
	unknown := false
	for i := 0; i < len(words); i++ {
		invert := words[i] == "!"
		if invert {
			i++
		}
		next := func() string {
			if i++; i < len(words) {
				return words[i]
			}
			return ""
		}
		if i >= len(words) {
			break
		}
		var test func(Packet) Tri
		switch option := words[i]; option {
		case "-j", "-g":
			verdict = legacyVerdict(next(), option == "-g")
		case "-m", "--comment", "--reject-with":
			next()
		case "--set-xmark", "--set-mark", "--or-mark":
			mark, _, _ := strings.Cut(next(), "/")
			n, _ := strconv.ParseUint(mark, 0, 32)
			r.SetsMark |= uint32(n)
		default:
			test = legacyTest(option, next)
			unknown = unknown || test == nil
		}
		if test != nil {
			conditions = append(conditions, func(p Packet) Tri {
				if invert {
					return test(p).Not()
				}
				return test(p)
			})
		}
	}
	r.Decide = func(p Packet) (Tri, Verdict) {
		t := Yes
		if unknown {
			t = Maybe
		}
		for _, c := range conditions {
			t = min(t, c(p))
		}
		return t, verdict
	}
	return r
}

func legacyVerdict(target string, isGoto bool) Verdict {
	switch target {
	case "ACCEPT":
		return Verdict{Kind: Accept}
	case "DROP", "REJECT":
		return Verdict{Kind: Drop}
	case "RETURN":
		return Verdict{Kind: Return}
	case "MARK", "CONNMARK", "LOG", "NFLOG", "CT", "NOTRACK", "TCPMSS", "SET", "TRACE", "MASQUERADE", "DNAT", "SNAT", "REDIRECT", "CHECKSUM", "DSCP", "TOS", "TTL", "HL":
		return Verdict{}
	}
	if isGoto {
		return Verdict{Kind: Goto, Target: target}
	}
	return Verdict{Kind: Jump, Target: target}
}

// legacyTest is nil for an option that it does not understand.
func legacyTest(option string, next func() string) func(Packet) Tri {
	switch option {
	case "-p":
		proto := next()
		return func(p Packet) Tri {
			if proto == "all" || p.Proto == 0 {
				return map[bool]Tri{true: Yes, false: Maybe}[proto == "all"]
			}
			return tri(protocols[p.Proto] == proto || strconv.Itoa(int(p.Proto)) == proto)
		}
	case "-i":
		name := next()
		return func(p Packet) Tri { return sameInterface(p.In, name) }
	case "-o":
		name := next()
		return func(p Packet) Tri { return sameInterface(p.Out, name) }
	case "-s":
		return inPrefix(next(), func(p Packet) netip.Addr { return p.Src })
	case "-d":
		return inPrefix(next(), func(p Packet) netip.Addr { return p.Dst })
	case "--dport":
		return inPorts(next(), func(p Packet) uint16 { return p.DstPort })
	case "--sport":
		return inPorts(next(), func(p Packet) uint16 { return p.SrcPort })
	case "--dports":
		return inPorts(next(), func(p Packet) uint16 { return p.DstPort })
	case "--sports":
		return inPorts(next(), func(p Packet) uint16 { return p.SrcPort })
	case "--ctstate", "--state":
		return inStates(next())
	}
	return nil
}

func sameInterface(have, want string) Tri {
	if have == "" {
		return Maybe
	}
	if prefix, wild := strings.CutSuffix(want, "+"); wild {
		return tri(strings.HasPrefix(have, prefix))
	}
	return tri(have == want)
}

func inPrefix(text string, of func(Packet) netip.Addr) func(Packet) Tri {
	prefix, err := netip.ParsePrefix(text)
	if a, aerr := netip.ParseAddr(text); err != nil && aerr == nil {
		prefix, err = netip.PrefixFrom(a, a.BitLen()), nil
	}
	if err != nil {
		return nil
	}
	return func(p Packet) Tri {
		if a := of(p); a.IsValid() {
			return tri(prefix.Contains(a))
		}
		return Maybe
	}
}

func inPorts(text string, of func(Packet) uint16) func(Packet) Tri {
	return func(p Packet) Tri {
		port := of(p)
		if port == 0 {
			return Maybe
		}
		for r := range strings.SplitSeq(text, ",") {
			first, last, isRange := strings.Cut(r, ":")
			if !isRange {
				last = first
			}
			from, err1 := strconv.ParseUint(first, 10, 16)
			until, err2 := strconv.ParseUint(last, 10, 16)
			if err1 != nil || err2 != nil {
				return Maybe
			}
			if uint64(port) >= from && uint64(port) <= until {
				return Yes
			}
		}
		return No
	}
}

func inStates(text string) func(Packet) Tri {
	var bits uint32
	known := map[string]uint32{"INVALID": stateInvalid, "ESTABLISHED": stateEstablished, "RELATED": stateRelated, "NEW": stateNew}
	for s := range strings.SplitSeq(text, ",") {
		bits |= known[s]
	}
	return func(p Packet) Tri {
		if p.State == 0 {
			return Maybe
		}
		return tri(bits&p.State != 0)
	}
}

// wireGuardPacket is one of a peer's that comes in by an interface.
func wireGuardPacket(ipv6 bool, in string, port int, state uint32) Packet {
	none := uint32(0)
	return Packet{IPv6: ipv6, Proto: unix.IPPROTO_UDP, DstPort: uint16(port), In: in, Mark: &none, State: state}
}
