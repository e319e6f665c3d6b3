// SPDX-License-Identifier: Apache-2.0

package simulate

import (
	"container/list"
	"time"
)

// scheduler is the virtual accelerator of one process: a block pool, a batch of running sequences and a queue. Its
// methods need process.mu.
type scheduler struct {
	opts     *Options
	cache    *blockCache
	queue    *list.List // of *ticket, first come first served
	running  int        // sequences in the batch
	deferred int        // sequences that wait for remote KV or for an adapter
	fetching int        // of those, the ones whose pull runs
	active   map[*group]struct{}
	leases   map[string]*lease          // by the remote_request_id of their handle, or what else the decode leg names
	awaited  map[string][]chan struct{} // by the id of a lease that is not there yet: closed when it is
	agents   map[string]struct{}        // engine ids this process shook hands with
	adapters map[string]int             // sequences per running LoRA adapter
	meter    meter
	events   *kvEvents // nil when the engine publishes none; immutable after openEvents
}

// ticket is a group's place in the queue.
type ticket struct {
	g      *group
	blocks bool // wants its blocks
	slots  bool // wants its places in the batch
	ready  chan struct{}
}

func (s *scheduler) init(o *Options) {
	s.opts = o
	s.cache = newBlockCache(o.BlockSize, o.NumBlocks)
	s.queue = list.New()
	s.active = map[*group]struct{}{}
	s.leases = map[string]*lease{}
	s.agents = map[string]struct{}{}
	s.adapters = map[string]int{}
	s.meter.init(time.Now())
}

// waiting counts the sequences in the queue: those that wait for capacity, and those whose adapter has no place.
func (s *scheduler) waiting() (capacity, adapter int) {
	for el := s.queue.Front(); el != nil; el = el.Next() {
		g := el.Value.(*ticket).g
		if s.adapterFits(g.lora) {
			capacity += len(g.seqs)
		} else {
			adapter += len(g.seqs)
		}
	}
	return capacity, adapter
}

// submit queues t, at the front for those who come back. It reports false when the queue is full.
func (s *scheduler) submit(t *ticket, front bool) bool {
	if !front && s.tooMany(t.g) {
		return false
	}
	s.active[t.g] = struct{}{}
	if front {
		s.queue.PushFront(t)
	} else {
		s.queue.PushBack(t)
	}
	s.admit()
	return true
}

// tooMany reports whether g would have to wait and may not.
func (s *scheduler) tooMany(g *group) bool {
	if s.opts.MaxWaiting == 0 || s.fits(g) {
		return false
	}
	capacity, adapter := s.waiting()
	return capacity+adapter+len(g.seqs) > s.opts.MaxWaiting
}

// fits reports whether g would be admitted at once.
func (s *scheduler) fits(g *group) bool {
	return s.queue.Len() == 0 && s.running+g.slots <= s.opts.MaxNumSeqs
}

// withdraw takes t out of the queue, if it still is there.
func (s *scheduler) withdraw(t *ticket) {
	for el := s.queue.Front(); el != nil; el = el.Next() {
		if el.Value == t {
			s.queue.Remove(el)
			s.admit()
			return
		}
	}
}

// admit lets waiting groups in, first come first served, while they fit.
func (s *scheduler) admit() {
	for el := s.queue.Front(); el != nil; {
		t := el.Value.(*ticket)
		if s.running+t.g.slots > s.opts.MaxNumSeqs {
			return
		}
		here := el
		el = el.Next()
		if !s.adapterFits(t.g.lora) {
			continue // others may pass a request that waits for its adapter
		}
		if t.blocks && !s.allocate(t.g) {
			return
		}
		if t.slots {
			s.running += t.g.slots
			t.g.placed = true
			s.adapterRuns(t.g.lora, t.g.slots)
		}
		s.queue.Remove(here)
		close(t.ready)
	}
}

func (s *scheduler) adapterFits(name string) bool {
	if name == "" || s.adapters[name] > 0 {
		return true
	}
	return len(s.adapters) < s.opts.MaxLoRAs
}

func (s *scheduler) adapterRuns(name string, n int) {
	if name == "" {
		return
	}
	if s.adapters[name] += n; s.adapters[name] <= 0 {
		delete(s.adapters, name)
	}
}

// allocate gives every sequence of g its blocks, those of the prefix cache first, or none to any.
func (s *scheduler) allocate(g *group) bool {
	for i, q := range g.seqs {
		if !s.allocateOne(q) {
			for _, done := range g.seqs[:i] {
				s.drop(done)
			}
			return false
		}
	}
	for _, q := range g.seqs {
		if !q.counted && q.sibling == nil {
			q.counted = true
			s.meter.add(metricSlots().prefixQueries, float64(len(q.tokens)))
			s.meter.add(metricSlots().prefixHits, float64(q.cached))
			s.meter.add(metricSlots().cachedDevice, float64(q.cached))
			s.meter.add(metricSlots().externalQueries, float64(len(q.tokens)-q.cached))
		}
	}
	return true
}

func (s *scheduler) allocateOne(q *sequence) bool {
	need := s.cache.need(len(q.tokens))
	if q.sibling != nil {
		full := q.prompt / s.cache.size
		q.wrong = q.sibling.wrong
		for _, id := range q.sibling.blocks[:full] {
			s.cache.take(id)
			q.blocks = append(q.blocks, id)
		}
		q.cached = full * s.cache.size
	} else {
		q.blocks = s.cache.match(q.blocks[:0], q.keys(), (len(q.tokens)-1)/s.cache.size)
		q.cached = len(q.blocks) * s.cache.size
		q.wrong = 0
		for i, id := range q.blocks {
			if c := s.cache.blocks[id].content; c != q.chain[i] {
				q.wrong ^= mix(c) | 1
			}
		}
	}
	missing := need - len(q.blocks)
	ok := s.cache.free >= missing+q.headroom
	if ok {
		q.blocks, ok = s.cache.alloc(q.blocks, missing)
	}
	if !ok {
		s.drop(q)
	}
	return ok
}

// drop gives back a sequence's blocks.
func (s *scheduler) drop(q *sequence) {
	s.cache.release(q.blocks)
	q.blocks = q.blocks[:0]
}

// leave takes g out of the batch and gives back the blocks that it still has.
func (s *scheduler) leave(g *group) {
	s.unplace(g)
	for _, q := range g.seqs {
		s.drop(q)
	}
	delete(s.active, g)
	s.admit()
}

func (s *scheduler) unplace(g *group) {
	if !g.placed {
		return
	}
	g.placed = false
	s.running -= g.slots
	s.adapterRuns(g.lora, -g.slots)
}

// computed says that the sequence's blocks hold the KV of its tokens now, and puts the full ones in the prefix cache.
// It returns the number of tokens that the cache did not have.
func (s *scheduler) computed(q *sequence) (created int) {
	keys := q.keys()
	for i := range q.chain {
		if i < q.pulled || i*s.cache.size < q.cached {
			continue
		}
		if _, ok := s.cache.index[keys[i]]; !ok {
			created += s.cache.size
		}
		s.cache.fill(q.blocks[i], keys[i], q.chain[i]^q.wrong)
	}
	s.announce(q, 0, s.opts.KVEvents.StepTokens)
	if rest := len(q.tokens) % s.cache.size; rest > 0 {
		s.fillOpen(q)
	}
	return created
}

// fillOpen records the last, partly filled block token by token.
func (s *scheduler) fillOpen(q *sequence) {
	last := len(q.blocks) - 1
	start := last * s.cache.size
	tail := q.tokens[start:]
	id := q.blocks[last]
	s.cache.fill(id, 0, chainHash(q.parent(), tail)^q.wrong)
	s.cache.open[id] = openBlock{parent: q.parent() ^ q.wrong, tokens: append([]uint32(nil), tail...)}
}

// grow adds the KV of one generated token; false when no block is free.
func (s *scheduler) grow(q *sequence, token uint32) bool {
	if len(q.tokens)%s.cache.size == 0 {
		var ok bool
		if q.blocks, ok = s.cache.alloc(q.blocks, 1); !ok {
			return false
		}
	}
	q.tokens = append(q.tokens, token)
	id := q.blocks[len(q.blocks)-1]
	o, ok := s.cache.open[id]
	if !ok {
		o.parent = q.parent() ^ q.wrong
	}
	o.tokens = append(o.tokens, token)
	s.cache.open[id] = o
	if len(q.tokens)%s.cache.size == 0 {
		h := chainHash(q.parent(), q.tokens[len(q.tokens)-s.cache.size:])
		q.chain = append(q.chain, h)
		s.cache.fill(id, q.key(h), h^q.wrong)
		s.announce(q, len(q.chain)-1, 0)
	}
	return true
}
