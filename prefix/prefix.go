// SPDX-License-Identifier: Apache-2.0

// Package prefix remembers which prompts went where. [Index] maps the chain hashes of prompt blocks to the endpoints
// that are believed to hold them, and answers how many leading blocks of a new prompt each endpoint has. Floor 1.
//
// What it promises: a match is contiguous from the start of the prompt; it is bounded in blocks per endpoint and in
// bytes altogether; eviction takes a chain's tail first, so that no block outlives its parent; an endpoint's entries
// go at once when it goes; a look-up takes no lock that a look-up elsewhere in the index could wait for.
//
// Why sharded read-write locks and not lock-free reads: the table must be bounded and shrink, and a map of plain
// integers under a lock is invisible to the garbage collector, which a structure of atomic pointers is not. The price
// is small because the pieces of a chain share a shard in runs of 16: one lock per 1,024 tokens of prompt, and fewer
// further down.
package prefix

import (
	"sync"
	"sync/atomic"

	"github.com/baton-epp/baton/pool"
)

// Sizes of the structure.
const (
	shardCount = 256 // the low byte of a key
	runPieces  = 16  // consecutive pieces of a chain that share a shard

	// nodeBytes and setBytes are what one (endpoint, piece) pair and one distinct piece cost, maps' spare room
	// included (measured by TestMemoryBound).
	nodeBytes = 26
	setBytes  = 50
)

// Defaults of [Options].
const (
	// MinBlockTokens is llm-d's floor: smaller blocks cost memory and find little more.
	MinBlockTokens = 64
	// DefaultCapacity is llm-d's lruCapacityPerServer.
	DefaultCapacity = 31250
	// DefaultMaxTokens is llm-d's maxPrefixTokensToMatch.
	DefaultMaxTokens = 131072
	// DefaultMaxBytes bounds the whole index: about 2.6 million pieces of 64 to 1,024 tokens.
	DefaultMaxBytes = 256 << 20
)

// Options configure an [Index].
type Options struct {
	// BlockTokens is the number of tokens in a block; raised to [MinBlockTokens]. A token is 4 bytes of prompt text.
	BlockTokens int
	// MaxTokens limits how much of a prompt is hashed, in tokens; 0 = all of it.
	MaxTokens int
	// Capacity is the number of blocks remembered per endpoint; default [DefaultCapacity].
	Capacity int
	// AutoTune replaces Capacity by the size of the endpoint's KV cache where its metrics tell it.
	AutoTune bool
	// MaxBytes bounds the memory of the whole index; default [DefaultMaxBytes].
	MaxBytes int64
}

// Index is the approximate prefix index. Safe for concurrent use.
type Index struct {
	// Immutable after New.
	blockTokens int

	limits atomic.Pointer[Options]
	bytes  atomic.Int64 // estimated size
	blocks atomic.Int64 // over all endpoints

	shards [shardCount]shard

	growMu   sync.Mutex
	lrus     atomic.Pointer[[]*lru] // by slot; replaced under growMu
	trimming sync.Mutex             // held by the one goroutine that trims
}

// New makes an empty index; it starts nothing.
func New(o Options) *Index {
	o = o.withDefaults()
	x := &Index{blockTokens: o.BlockTokens}
	x.limits.Store(&o)
	x.lrus.Store(&[]*lru{})
	for i := range x.shards {
		x.shards[i].sets = make(map[uint64]set)
	}
	return x
}

func (o Options) withDefaults() Options {
	o.BlockTokens = max(o.BlockTokens, MinBlockTokens)
	if o.Capacity <= 0 {
		o.Capacity = DefaultCapacity
	}
	if o.MaxBytes <= 0 {
		o.MaxBytes = DefaultMaxBytes
	}
	return o
}

// SetLimits changes the bounds of a living index, for a configuration reload. It reports false, and changes nothing,
// when o asks for another block size: then the hashes differ and a new index is needed.
func (x *Index) SetLimits(o Options) bool {
	o = o.withDefaults()
	if o.BlockTokens != x.blockTokens {
		return false
	}
	x.limits.Store(&o)
	return true
}

// BlockTokens is the number of tokens in a block.
func (x *Index) BlockTokens() int { return x.blockTokens }

// Blocks is the number of blocks remembered, a block on two endpoints counted twice.
func (x *Index) Blocks() int64 { return x.blocks.Load() }

// Bytes is the estimated size of the index.
func (x *Index) Bytes() int64 { return x.bytes.Load() }

// Learn notes that the endpoint behind st was sent the prompt of k. What arrives after Forget of the same endpoint is
// ignored.
func (x *Index) Learn(st *pool.State, k *Keys) {
	if len(k.Hashes) == 0 {
		return
	}
	l := x.lruOf(st.Slot)
	if l.learn(x, st, k.Hashes, x.capacity(st)) {
		x.trim()
	}
}

// capacity is the number of blocks that st may have in the index.
func (x *Index) capacity(st *pool.State) int64 {
	o := x.limits.Load()
	if m := st.Metrics(); o.AutoTune && m.Has&pool.HasCacheConfig != 0 && m.NumBlocks > 0 && m.BlockSize > 0 {
		return max(1, int64(m.NumBlocks)*int64(m.BlockSize)/int64(x.blockTokens))
	}
	return int64(o.Capacity)
}

// Forget drops everything known about the endpoint in slot before it returns, so that the slot may be given to
// another endpoint.
func (x *Index) Forget(slot uint32) {
	lrus := *x.lrus.Load()
	if int(slot) < len(lrus) {
		lrus[slot].forget(x)
	}
}

// lruOf returns the list of slot, made on first use.
func (x *Index) lruOf(slot uint32) *lru {
	if lrus := *x.lrus.Load(); int(slot) < len(lrus) {
		return lrus[slot]
	}
	x.growMu.Lock()
	defer x.growMu.Unlock()
	old := *x.lrus.Load()
	if int(slot) < len(old) {
		return old[slot]
	}
	grown := make([]*lru, max(int(slot)+1, 2*len(old)))
	for i := copy(grown, old); i < len(grown); i++ {
		grown[i] = &lru{slot: uint32(i)} //nolint:gosec // grown to a slot, which is one
	}
	x.lrus.Store(&grown)
	return grown[slot]
}

// trim takes the oldest blocks of the endpoint that has most, until the index fits its bound again. One goroutine
// trims at a time; the others go on, since the bound is only passed by what they learn meanwhile.
func (x *Index) trim() {
	limit := x.limits.Load().MaxBytes
	if x.bytes.Load() <= limit || !x.trimming.TryLock() {
		return
	}
	defer x.trimming.Unlock()
	for x.bytes.Load() > limit {
		var largest *lru
		for _, l := range *x.lrus.Load() {
			if largest == nil || l.size.Load() > largest.size.Load() {
				largest = l
			}
		}
		// A little more than needed, so that not every request has to trim.
		excess := (x.bytes.Load()-limit)/nodeBytes + 64
		if largest == nil || largest.shrink(x, int(excess)) == 0 {
			return
		}
	}
}
