// SPDX-License-Identifier: Apache-2.0

package prefix

import (
	"math/bits"
	"slices"
	"sync"
)

// member is one endpoint that holds a piece: its slot plus one, and the piece's node in that endpoint's list.
type member struct{ slot, node uint32 }

// set is the endpoints that hold one piece: up to two, or a wideSet. Without pointers, so that the collector never
// looks into the maps.
type set [2]member

// wideMark in the first member's slot says that its node is an index into shard.wide.
const wideMark = ^uint32(0)

// shard is one part of the table of pieces.
type shard struct {
	mu   sync.RWMutex
	sets map[uint64]set // guarded by mu
	wide []wideSet      // guarded by mu
	free []uint32       // unused cells of wide, guarded by mu

	_ [32]byte // keeps the locks of neighbours off one cache line
}

// find returns the node of key in slot's list.
func (s *shard) find(key uint64, slot uint32) (node uint32, known bool) {
	s.mu.RLock()
	defer s.mu.RUnlock()
	e := s.sets[key]
	if e[0].slot == wideMark {
		return s.wide[e[0].node].find(slot)
	}
	for _, m := range e {
		if m.slot == slot+1 {
			return m.node, true
		}
	}
	return 0, false
}

// add notes that slot holds key, which it did not, and returns the bytes that this cost.
func (s *shard) add(key uint64, slot, node uint32) int64 {
	s.mu.Lock()
	defer s.mu.Unlock()
	e := s.sets[key]
	switch {
	case e[0].slot == 0:
		s.sets[key] = set{{slot + 1, node}}
		return setBytes
	case e[0].slot == wideMark:
		return s.wide[e[0].node].add(slot, node)
	case e[1].slot == 0:
		e[1] = member{slot + 1, node}
		s.sets[key] = e
		return 0
	}
	w := s.newWide()
	cost := s.wide[w].add(slot, node) + wideBytes
	for _, m := range e {
		cost += s.wide[w].add(m.slot-1, m.node)
	}
	s.sets[key] = set{{wideMark, w}}
	return cost
}

// newWide returns the index of an empty wideSet.
func (s *shard) newWide() uint32 {
	if n := len(s.free); n > 0 {
		w := s.free[n-1]
		s.free = s.free[:n-1]
		return w
	}
	s.wide = append(s.wide, wideSet{})
	return uint32(len(s.wide) - 1) //nolint:gosec // bounded by the number of pieces
}

// remove notes that slot no longer holds key and returns the bytes that this freed.
func (s *shard) remove(key uint64, slot uint32) int64 {
	s.mu.Lock()
	defer s.mu.Unlock()
	e, known := s.sets[key]
	if !known {
		return 0
	}
	if e[0].slot == wideMark {
		w := &s.wide[e[0].node]
		freed := w.remove(slot)
		if len(w.nodes) > 0 {
			return freed
		}
		freed += wideBytes + w.bytes() + setBytes
		*w = wideSet{}
		s.free = append(s.free, e[0].node)
		delete(s.sets, key)
		return freed
	}
	if e[0].slot == slot+1 {
		e[0] = e[1]
	}
	if e[0].slot == 0 {
		delete(s.sets, key)
		return setBytes
	}
	s.sets[key] = set{e[0]}
	return 0
}

// wideSet is a set of more than two endpoints: a bitmap of slots, and the nodes in the order of the slots.
type wideSet struct {
	bits  []uint64
	nodes []uint32
}

// wideBytes is what an empty wideSet takes.
const wideBytes = 48

func (w *wideSet) bytes() int64 { return int64(8 * len(w.bits)) }

// position is where slot's node stands, or would stand.
func (w *wideSet) position(slot uint32) (at int, known bool) {
	word := int(slot / 64)
	if word >= len(w.bits) {
		return len(w.nodes), false
	}
	for _, b := range w.bits[:word] {
		at += bits.OnesCount64(b)
	}
	bit := uint64(1) << (slot % 64)
	return at + bits.OnesCount64(w.bits[word]&(bit-1)), w.bits[word]&bit != 0
}

func (w *wideSet) find(slot uint32) (node uint32, known bool) {
	at, known := w.position(slot)
	if !known {
		return 0, false
	}
	return w.nodes[at], true
}

// nodeCost is what one more endpoint costs in a wideSet, spare room included.
const nodeCost = 6

func (w *wideSet) add(slot, node uint32) int64 {
	at, known := w.position(slot)
	if known {
		w.nodes[at] = node
		return 0
	}
	cost := int64(nodeCost)
	if need := int(slot/64) + 1; need > len(w.bits) {
		cost += int64(8 * (need - len(w.bits)))
		w.bits = append(w.bits, make([]uint64, need-len(w.bits))...)
	}
	w.bits[slot/64] |= 1 << (slot % 64)
	w.nodes = slices.Insert(w.nodes, at, node)
	return cost
}

func (w *wideSet) remove(slot uint32) int64 {
	at, known := w.position(slot)
	if !known {
		return 0
	}
	w.bits[slot/64] &^= 1 << (slot % 64)
	w.nodes = slices.Delete(w.nodes, at, at+1)
	return nodeCost
}

// word returns 64 slots as a bitmap.
func (s *shard) word(e set, w uint32) uint64 {
	if e[0].slot == wideMark {
		if b := s.wide[e[0].node].bits; int(w) < len(b) {
			return b[w]
		}
		return 0
	}
	var have uint64
	for _, m := range e {
		if m.slot != 0 && (m.slot-1)/64 == w {
			have |= 1 << ((m.slot - 1) % 64)
		}
	}
	return have
}
