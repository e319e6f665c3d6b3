// SPDX-License-Identifier: Apache-2.0

package simulate

import "slices"

// block is one KV block. What it is believed to hold (key) and what it holds (content) differ after a pull of blocks
// that the prefill engine had reused, and then the engine's answers are wrong, as a real one's are.
type block struct {
	key        uint64 // under which the prefix cache finds it; 0 when it is not in the cache
	content    uint64 // hash of the whole token prefix up to the block's last token
	refs       int32  // sequences and leases that use it
	prev, next int32  // in the free list
}

// openBlock is what a prompt's last block holds, token by token, because a pull may want a part of it.
type openBlock struct {
	parent uint64
	tokens []uint32
}

// blockCache is the block pool with its prefix cache: ids from 1 (0 is the null block), used ones counted, free ones
// in least-recently-used order with those never used first. Not safe for concurrent use.
type blockCache struct {
	size   int // tokens per block
	total  int // blocks, the null block included
	blocks []block
	index  map[uint64]int32 // key to block
	open   map[int32]openBlock
	free   int // blocks with no reference, the never used ones included

	evicted func(id int32) // told of each block that leaves the prefix cache; nil for nobody
}

func newBlockCache(size, total int) *blockCache {
	return &blockCache{
		size: size, total: total, free: total - 1,
		blocks: make([]block, 1), // blocks[0] is the free list's sentinel
		index:  map[uint64]int32{}, open: map[int32]openBlock{},
	}
}

// usage is the fraction of blocks in use, leases included.
func (c *blockCache) usage() float64 { return 1 - float64(c.free)/float64(c.total-1) }

func (c *blockCache) used() int { return c.total - 1 - c.free }

// need is the number of blocks for n tokens.
func (c *blockCache) need(n int) int { return (n + c.size - 1) / c.size }

// match appends the cached blocks of the longest known prefix, at most limit of them, and takes a reference on each.
func (c *blockCache) match(dst []int32, keys []uint64, limit int) []int32 {
	for _, k := range keys[:min(limit, len(keys))] {
		id, ok := c.index[k]
		if !ok {
			break
		}
		c.take(id)
		dst = append(dst, id)
	}
	return dst
}

// take adds a reference.
func (c *blockCache) take(id int32) {
	b := &c.blocks[id]
	if b.refs == 0 {
		c.blocks[b.prev].next, c.blocks[b.next].prev = b.next, b.prev
		c.free--
	}
	b.refs++
}

// alloc appends n blocks to dst, evicting the least recently used from the prefix cache. It takes all or none.
func (c *blockCache) alloc(dst []int32, n int) ([]int32, bool) {
	if n > c.free {
		return dst, false
	}
	for range n {
		dst = append(dst, c.allocOne())
	}
	return dst, true
}

func (c *blockCache) allocOne() int32 {
	c.free--
	if len(c.blocks) < c.total {
		c.blocks = append(c.blocks, block{refs: 1})
		return int32(len(c.blocks) - 1) //nolint:gosec // total fits int32
	}
	id := c.blocks[0].next
	b := &c.blocks[id]
	c.blocks[b.prev].next, c.blocks[b.next].prev = b.next, b.prev
	c.forget(id)
	*b = block{refs: 1}
	return id
}

func (c *blockCache) forget(id int32) {
	if k := c.blocks[id].key; k != 0 && c.index[k] == id {
		delete(c.index, k)
		c.tellEvicted(id)
	}
	delete(c.open, id)
}

func (c *blockCache) tellEvicted(id int32) {
	if c.evicted != nil {
		c.evicted(id)
	}
}

// release gives back one reference of each block, the last first, so that a prefix outlives what follows it.
func (c *blockCache) release(ids []int32) {
	for _, id := range slices.Backward(ids) {
		b := &c.blocks[id]
		if b.refs--; b.refs > 0 {
			continue
		}
		tail := c.blocks[0].prev
		b.prev, b.next = tail, 0
		c.blocks[tail].next, c.blocks[0].prev = id, id
		c.free++
	}
}

// fill says what block id holds now. A key of 0 keeps it out of the prefix cache.
func (c *blockCache) fill(id int32, key, content uint64) {
	b := &c.blocks[id]
	b.content = content
	if key == 0 {
		return
	}
	if _, ok := c.index[key]; !ok {
		b.key = key
		c.index[key] = id
	}
}

// evict empties the prefix cache of every free block and returns how many there were: what /reset_prefix_cache does.
func (c *blockCache) evict() int {
	n := 0
	for k, id := range c.index {
		if c.blocks[id].refs == 0 {
			c.blocks[id].key = 0
			delete(c.index, k)
			c.tellEvicted(id)
			n++
		}
	}
	return n
}

// peek returns what the blocks hold; ok is false when an id is outside the pool.
func (c *blockCache) peek(ids []int64) (out []blockContent, ok bool) {
	out = make([]blockContent, len(ids))
	for i, id := range ids {
		if id < 0 || id >= int64(c.total) {
			return nil, false
		}
		if id >= int64(len(c.blocks)) {
			continue // never used: zeros
		}
		n := int32(id) //nolint:gosec // below total
		out[i] = blockContent{content: c.blocks[n].content, open: c.open[n]}
	}
	return out, true
}

// blockContent is a copy of what one block holds.
type blockContent struct {
	content uint64
	open    openBlock
}

// holds reports whether the block holds the KV of want after the prefix parent; full is their chain hash.
func (b blockContent) holds(parent uint64, want []uint32, full uint64) bool {
	if b.content == full {
		return true
	}
	if b.open.parent != parent || len(b.open.tokens) < len(want) {
		return false
	}
	for i, t := range want {
		if b.open.tokens[i] != t {
			return false
		}
	}
	return true
}
