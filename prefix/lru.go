// SPDX-License-Identifier: Apache-2.0

package prefix

import (
	"sync"
	"sync/atomic"

	"github.com/baton-epp/baton/pool"
)

// lru is what one endpoint holds, newest first. A chain is touched from its tail to its head, so a parent is always
// newer than its children and the oldest piece is never one that another kept piece depends on.
type lru struct {
	slot uint32       // immutable
	size atomic.Int64 // in blocks; written under mu

	mu    sync.Mutex
	owner *pool.State // guarded by mu: whose blocks these are
	gone  *pool.State // guarded by mu: the owner that was forgotten last
	// nodes is guarded by mu: [0] is the ring's anchor, its next the newest, its prev the oldest piece. Where a piece's
	// node is, the table of pieces knows.
	nodes []node
	free  uint32 // guarded by mu: head of the list of unused nodes, linked by next
}

type node struct {
	key        uint64
	prev, next uint32
}

// learn moves the chain to the front, as far as it fits, and reports whether anything was added.
func (l *lru) learn(x *Index, st *pool.State, chain []uint64, capacity int64) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	if st == l.gone || !l.claimLocked(x, st) {
		return false
	}
	added := int64(0)
	for i := min(len(chain), piecesIn(int(capacity))) - 1; i >= 0; i-- {
		key := chain[i]
		s := &x.shards[key&shardMask]
		if n, known := s.find(key, l.slot); known {
			l.unlinkLocked(n)
			l.linkLocked(n)
			continue
		}
		blocks := weight(key)
		for l.size.Load()+blocks > capacity {
			l.evictLocked(x)
		}
		n := l.newNodeLocked(key)
		l.linkLocked(n)
		l.size.Add(blocks)
		added += nodeBytes + s.add(key, l.slot, n)
		x.blocks.Add(blocks)
	}
	if added != 0 {
		x.bytes.Add(added)
	}
	return added != 0
}

// claimLocked makes st the owner; what an earlier owner of the slot left is dropped. An older endpoint than the owner
// is refused: its slot has been given away.
func (l *lru) claimLocked(x *Index, st *pool.State) bool {
	if l.owner != st {
		if l.owner != nil {
			if st.Born.Before(l.owner.Born) {
				return false
			}
			l.clearLocked(x)
		}
		l.owner = st
	}
	if l.nodes == nil {
		l.nodes = make([]node, 1)
	}
	return true
}

func (l *lru) newNodeLocked(key uint64) uint32 {
	if n := l.free; n != 0 {
		l.free = l.nodes[n].next
		l.nodes[n].key = key
		return n
	}
	l.nodes = append(l.nodes, node{key: key})
	return uint32(len(l.nodes) - 1) //nolint:gosec // bounded by the capacity
}

// linkLocked puts n in front.
func (l *lru) linkLocked(n uint32) {
	first := l.nodes[0].next
	l.nodes[n].prev, l.nodes[n].next = 0, first
	l.nodes[first].prev = n
	l.nodes[0].next = n
}

func (l *lru) unlinkLocked(n uint32) {
	prev, next := l.nodes[n].prev, l.nodes[n].next
	l.nodes[prev].next = next
	l.nodes[next].prev = prev
}

// evictLocked drops the oldest piece; there is one.
func (l *lru) evictLocked(x *Index) {
	n := l.nodes[0].prev
	key := l.nodes[n].key
	l.unlinkLocked(n)
	l.nodes[n].next = l.free
	l.free = n
	l.size.Add(-weight(key))
	x.blocks.Add(-weight(key))
	x.bytes.Add(-nodeBytes - x.shards[key&shardMask].remove(key, l.slot))
}

// shrink drops up to n of the oldest pieces and returns how many it dropped.
func (l *lru) shrink(x *Index, n int) int {
	l.mu.Lock()
	defer l.mu.Unlock()
	dropped := 0
	for dropped < n && l.size.Load() > 0 {
		l.evictLocked(x)
		dropped++
	}
	return dropped
}

// forget drops everything; the owner will not be let in again.
func (l *lru) forget(x *Index) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.clearLocked(x)
	l.gone, l.owner = l.owner, nil
}

func (l *lru) clearLocked(x *Index) {
	for l.size.Load() > 0 {
		l.evictLocked(x)
	}
	l.nodes, l.free = nil, 0
}
