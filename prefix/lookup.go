// SPDX-License-Identifier: Apache-2.0

package prefix

import "math/bits"

// Matches is the result of [Index.Lookup]: leading blocks per endpoint. It is meant to be reused.
type Matches struct {
	counts []int32  // by slot
	alive  []uint64 // bitmap of the slots that hold every piece so far
	lo, hi int      // the words of alive that may be non-zero, hi exclusive
}

// Of is how many leading blocks the endpoint in slot holds.
func (m *Matches) Of(slot uint32) int32 {
	if int(slot) < len(m.counts) {
		return m.counts[slot]
	}
	return 0
}

// Lookup finds, for every endpoint, how many leading blocks of the prompt it holds. It walks the chain until nobody
// has the next piece.
func (x *Index) Lookup(k *Keys, m *Matches) {
	m.reset(len(*x.lrus.Load()))
	i := 0
	for i < len(k.Hashes) {
		end := min(i+runPieces, len(k.Hashes))
		s := &x.shards[k.Hashes[i]&shardMask]
		s.mu.RLock()
		for i < end {
			e, known := s.sets[k.Hashes[i]]
			if !known || !m.narrow(s, e, i) {
				break
			}
			i++
		}
		s.mu.RUnlock()
		if i < end {
			break
		}
	}
	m.finish(min(blocksIn(i), k.Blocks))
}

// reset empties m for n slots.
func (m *Matches) reset(n int) {
	if cap(m.counts) < n {
		m.counts = make([]int32, n)
		m.alive = make([]uint64, (n+63)/64)
	}
	m.counts = m.counts[:n]
	m.alive = m.alive[:(n+63)/64]
	clear(m.counts)
	m.lo, m.hi = 0, len(m.alive)
}

// narrow keeps those that hold piece i too and notes how far the others came; false when nobody is left.
func (m *Matches) narrow(s *shard, e set, i int) bool {
	lo, hi := m.hi, m.lo
	for w := m.lo; w < m.hi; w++ {
		have := s.word(e, uint32(w)) //nolint:gosec // an index into the bitmap
		if i > 0 {
			for gone := m.alive[w] &^ have; gone != 0; gone &= gone - 1 {
				m.counts[w*64+bits.TrailingZeros64(gone)] = int32(blocksIn(i)) //nolint:gosec // far below 2^31
			}
			have &= m.alive[w]
		}
		if m.alive[w] = have; have != 0 {
			lo, hi = min(lo, w), w+1
		}
	}
	m.lo, m.hi = lo, max(lo, hi)
	return lo < hi
}

// finish notes n blocks for everyone who held all of them.
func (m *Matches) finish(n int) {
	if n == 0 {
		return
	}
	for w := m.lo; w < m.hi; w++ {
		for left := m.alive[w]; left != 0; left &= left - 1 {
			m.counts[w*64+bits.TrailingZeros64(left)] = int32(n) //nolint:gosec // far below 2^31
		}
	}
}
