// SPDX-License-Identifier: Apache-2.0

package simulate

import "sync"

// blockStore is a bounded store of KV blocks by prefix hash, shared by engines. Safe for concurrent use.
type blockStore struct {
	mu    sync.Mutex
	held  map[uint64]uint64 // key to content
	order []uint64
}

// put stores blocks; those that are there stay as they are.
func (s *blockStore) put(keys, contents []uint64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.held == nil {
		s.held = map[uint64]uint64{}
	}
	for i, k := range keys {
		if _, ok := s.held[k]; !ok {
			s.held[k] = contents[i]
			s.order = append(s.order, k)
		}
	}
	if n := len(s.order) - maxStoredBlocks; n > 0 {
		for _, k := range s.order[:n] {
			delete(s.held, k)
		}
		s.order = s.order[n:]
	}
}

// find returns what the blocks of the longest known prefix hold.
func (s *blockStore) find(keys []uint64) (contents []uint64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, k := range keys {
		c, ok := s.held[k]
		if !ok {
			break
		}
		contents = append(contents, c)
	}
	return contents
}

// drop empties the store.
func (s *blockStore) drop() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.held, s.order = nil, nil
}

// DropStored empties the store that engines with a shared-storage connector meet in, as its eviction does.
func (r *Registry) DropStored() { r.blocks.drop() }
