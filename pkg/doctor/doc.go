// Package doctor finds what is wrong with a node, and says how to mend it.
//
//	Sources --Gather--> Facts --Examine--> []Check
//
// Gather looks: at the kernel, at files, at the registry, and, by a few packets of
// its own, at the way to the peers. It changes nothing. Examine decides, and does
// nothing else: the same Facts give the same Checks.
package doctor
