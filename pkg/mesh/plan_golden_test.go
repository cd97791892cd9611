package mesh_test

// What TestNewPlan expects in the kernel. The routes' src is the tunnel address: with
// another, what the node itself sends is not answered (kilo#408).
const (
	alone = `
ip link wgcni0 mtu 1420 up
ip address 10.244.1.0/32 dev wgcni0
wg wgcni0 public-key k1 listen-port 51820 fwmark 0x1000000
ip route unreachable 10.244.0.0/16 metric 1048576 table 5182
ip route throw 10.244.1.0/24 table 5182
ip rule ipv4 priority 5182 not fwmark 0x1000000/0x1000000 lookup 5182
nft table for wgcni0
nft set cluster 10.244.0.0/16
nft set guarded 10.244.0.0/16
nft set local 10.244.1.0/24
`
	required4 = `
ip link wgcni0 mtu 1420 up
ip address 10.244.1.0/32 dev wgcni0
wg wgcni0 public-key k1 listen-port 51820 fwmark 0x1000000
wg wgcni0 peer k2 endpoint 192.0.2.2:51820 allowed-ips 10.244.2.0/24
ip route unreachable 10.244.0.0/16 metric 1048576 table 5182
ip route throw 10.244.1.0/24 table 5182
ip route 10.244.2.0/24 dev wgcni0 src 10.244.1.0 table 5182
ip rule ipv4 priority 5182 not fwmark 0x1000000/0x1000000 lookup 5182
nft table for wgcni0
nft set cluster 10.244.0.0/16
nft set guarded 10.244.0.0/16
nft set local 10.244.1.0/24
`
	preferred4 = `
ip link wgcni0 mtu 1420 up
ip address 10.244.1.0/32 dev wgcni0
wg wgcni0 public-key k1 listen-port 51820 fwmark 0x1000000
wg wgcni0 peer k2 endpoint 192.0.2.2:51820 persistent-keepalive 25s allowed-ips 10.244.2.0/24
ip route throw 10.244.1.0/24 table 5182
ip route 10.244.2.0/24 dev wgcni0 src 10.244.1.0 table 5182
ip rule ipv4 priority 5182 not fwmark 0x1000000/0x1000000 lookup 5182
nft table for wgcni0
nft set cluster 10.244.0.0/16
nft set guarded 10.244.2.0/24
nft set local 10.244.1.0/24
`
	required6 = `
ip link wgcni0 mtu 1420 up
ip address fd00:244:1::/128 dev wgcni0
wg wgcni0 public-key k1 listen-port 51820 fwmark 0x1000000
wg wgcni0 peer k2 endpoint [2001:db8::2]:51820 allowed-ips fd00:244:2::/64
ip route unreachable fd00:244::/32 metric 1048576 table 5182
ip route throw fd00:244:1::/64 table 5182
ip route fd00:244:2::/64 dev wgcni0 src fd00:244:1:: table 5182
ip rule ipv6 priority 5182 not fwmark 0x1000000/0x1000000 lookup 5182
nft table for wgcni0
nft set cluster fd00:244::/32
nft set guarded fd00:244::/32
nft set local fd00:244:1::/64
`
	dual = `
ip link wgcni0 mtu 1420 up
ip address 10.244.1.0/32 dev wgcni0
ip address fd00:244:1::/128 dev wgcni0
wg wgcni0 public-key k1 listen-port 51820 fwmark 0x1000000
wg wgcni0 peer k2 endpoint [2001:db8::2]:51820 allowed-ips fd00:244:2::/64
wg wgcni0 peer k3 endpoint 192.0.2.3:51820 allowed-ips 10.244.3.0/24
ip route unreachable 10.244.0.0/16 metric 1048576 table 5182
ip route throw 10.244.1.0/24 table 5182
ip route 10.244.3.0/24 dev wgcni0 src 10.244.1.0 table 5182
ip route unreachable fd00:244::/32 metric 1048576 table 5182
ip route throw fd00:244:1::/64 table 5182
ip route fd00:244:2::/64 dev wgcni0 src fd00:244:1:: table 5182
ip rule ipv4 priority 5182 not fwmark 0x1000000/0x1000000 lookup 5182
ip rule ipv6 priority 5182 not fwmark 0x1000000/0x1000000 lookup 5182
nft table for wgcni0
nft set cluster 10.244.0.0/16 fd00:244::/32
nft set guarded 10.244.0.0/16 fd00:244::/32
nft set local 10.244.1.0/24 fd00:244:1::/64
`
	keyless = `
ip route unreachable 10.244.0.0/16 metric 1048576 table 5182
ip route throw 10.244.1.0/24 table 5182
ip route throw 10.244.200.1/32 table 5182
ip rule ipv4 priority 5182 not fwmark 0x1000000/0x1000000 lookup 5182
nft table for wgcni0
nft set cluster 10.244.0.0/16
nft set guarded 10.244.0.0/16
nft set local 10.244.1.0/24
nft set pods 10.244.200.1
`
	keylessPreferred = `
ip route throw 10.244.1.0/24 table 5182
ip rule ipv4 priority 5182 not fwmark 0x1000000/0x1000000 lookup 5182
nft table for wgcni0
nft set cluster 10.244.0.0/16
nft set local 10.244.1.0/24
`
	outside = `
ip link wgcni0 mtu 1420 up
ip address 10.244.1.0/32 dev wgcni0
wg wgcni0 public-key k1 listen-port 51820 fwmark 0x1000000
wg wgcni0 peer k2 endpoint 192.0.2.2:51820 allowed-ips 10.244.2.0/24,10.244.200.2/31
ip route unreachable 10.244.0.0/16 metric 1048576 table 5182
ip route throw 10.244.1.0/24 table 5182
ip route 10.244.2.0/24 dev wgcni0 src 10.244.1.0 table 5182
ip route throw 10.244.200.1/32 table 5182
ip route 10.244.200.2/31 dev wgcni0 src 10.244.1.0 table 5182
ip route throw 10.244.200.9/32 table 5182
ip rule ipv4 priority 5182 not fwmark 0x1000000/0x1000000 lookup 5182
nft table for wgcni0
nft set cluster 10.244.0.0/16
nft set guarded 10.244.0.0/16
nft set local 10.244.1.0/24
nft set pods 10.244.200.1 10.244.200.9
`
	shared = `
ip link wgcni0 mtu 1420 up
wg wgcni0 public-key k1 listen-port 51820 fwmark 0x1000000
wg wgcni0 peer k2 endpoint 10.0.0.2:51820 allowed-ips 10.0.7.7/32
ip route unreachable 10.0.0.0/16 metric 1048576 table 5182
ip route throw 10.0.0.1/32 table 5182
ip route throw 10.0.0.2/32 table 5182
ip route throw 10.0.7.1/32 table 5182
ip route 10.0.7.7/32 dev wgcni0 table 5182
ip rule ipv4 priority 5182 not fwmark 0x1000000/0x1000000 lookup 5182
nft table for wgcni0
nft set cluster 10.0.0.0/16
nft set guarded 10.0.0.0/16
nft set pods 10.0.7.1
nft set exempt 10.0.0.1 10.0.0.2
`
	withC = `
ip link wgcni0 mtu 1420 up
ip address 10.244.1.0/32 dev wgcni0
wg wgcni0 public-key k1 listen-port 51820 fwmark 0x1000000
wg wgcni0 peer k2 endpoint 192.0.2.2:51820 allowed-ips 10.244.2.0/24
wg wgcni0 peer k3 endpoint 192.0.2.3:51820
ip route unreachable 10.244.0.0/16 metric 1048576 table 5182
ip route throw 10.244.1.0/24 table 5182
ip route 10.244.2.0/24 dev wgcni0 src 10.244.1.0 table 5182
ip rule ipv4 priority 5182 not fwmark 0x1000000/0x1000000 lookup 5182
nft table for wgcni0
nft set cluster 10.244.0.0/16
nft set guarded 10.244.0.0/16
nft set local 10.244.1.0/24
`
	presharedKey = `
ip link wgcni0 mtu 1420 up
ip address 10.244.1.0/32 dev wgcni0
wg wgcni0 public-key k1 listen-port 51820 fwmark 0x1000000
wg wgcni0 peer k2 preshared key: (hidden) endpoint 192.0.2.2:51820 allowed-ips 10.244.2.0/24
wg wgcni0 peer k3 endpoint 192.0.2.3:51820
ip route unreachable 10.244.0.0/16 metric 1048576 table 5182
ip route throw 10.244.1.0/24 table 5182
ip route 10.244.2.0/24 dev wgcni0 src 10.244.1.0 table 5182
ip rule ipv4 priority 5182 not fwmark 0x1000000/0x1000000 lookup 5182
nft table for wgcni0
nft set cluster 10.244.0.0/16
nft set guarded 10.244.0.0/16
nft set local 10.244.1.0/24
`
)
