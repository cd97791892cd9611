package store

import (
	"encoding/binary"
	"fmt"
	"os"
	"slices"

	bolt "go.etcd.io/bbolt"
)

// What bbolt writes of a page that leads to others: a header, then an element for
// each of them, which ends with that page's number.
const (
	pageHeader    = 16
	branchElement = 16
	branchChild   = 8 // in an element
)

// checkPages looks at what bbolt believes of its pages, and what would keep it busy
// for ever, with the lock held and until the memory is used up: how many more pages
// one goes on for, each of which is noted when it is written anew, and whether those
// that lead to others lead back.
func (f *file) checkPages(tx *bolt.Tx) error {
	if f.trusted {
		return nil
	}
	pageSize := tx.DB().Info().PageSize
	pages := int(tx.Size() / int64(pageSize))
	parents := map[int]int{} // by the page that is led to
	for id := 0; id < pages; {
		p, err := tx.Page(id)
		if err != nil {
			return err
		}
		if p.Type == "free" { // and its header may be anything
			id++
			continue
		}
		if p.OverflowCount >= pages-id {
			return fmt.Errorf("%w: page %d of %d goes on for %d more", errDamage, id, pages, p.OverflowCount)
		}
		if p.Type == "branch" {
			children, err := f.children(int64(id)*int64(pageSize), p.Count)
			if err != nil {
				return err
			}
			for _, child := range children {
				if parent, twice := parents[child]; twice {
					return fmt.Errorf("%w: pages %d and %d both lead to page %d", errDamage, parent, id, child)
				}
				parents[child] = id
			}
		}
		id += 1 + p.OverflowCount
	}
	return leadsBack(parents)
}

// children reads which pages the one at an offset leads to. Some may not exist, of
// which bbolt makes something finite.
func (f *file) children(offset int64, count int) (ids []int, err error) {
	raw, err := os.Open(f.path)
	if err != nil {
		return nil, err
	}
	defer raw.Close()
	elements := make([]byte, count*branchElement)
	if _, err := raw.ReadAt(elements, offset+pageHeader); err != nil {
		return nil, fmt.Errorf("%w: what the page at %d leads to: %w", errDamage, offset, err)
	}
	for e := range slices.Chunk(elements, branchElement) {
		ids = append(ids, int(binary.NativeEndian.Uint64(e[branchChild:])))
	}
	return ids, nil
}

// leadsBack is an error where the way up from a page does not end.
func leadsBack(parents map[int]int) error {
	for id := range parents {
		steps := 0
		for at, more := parents[id]; more; at, more = parents[at] {
			if steps++; steps > len(parents) {
				return fmt.Errorf("%w: page %d leads back to itself", errDamage, at)
			}
		}
	}
	return nil
}
