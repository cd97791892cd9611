#!/bin/sh
# Lets packets out of the tunnel in to the containers, on all of their ports. Docker
# itself lets none in but those to published ports, and never touches DOCKER-USER. The
# + is for wgcni0x, which packets come by while keys are replaced.
set -eu
for iptables in iptables ip6tables; do
	rule='DOCKER-USER -i wgcni0+ -o docker0 -j ACCEPT'
	# shellcheck disable=SC2086 # the words of the rule are arguments
	$iptables -w -C $rule 2>/dev/null || $iptables -w -I $rule
done
