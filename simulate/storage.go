// SPDX-License-Identifier: Apache-2.0

package simulate

import (
	"context"
	"encoding/json"
	"errors"
	"time"
)

// storage is every connector whose engines meet in a store that no leg names: vLLM's shared storage, LMCache as a cache,
// object stores. Whatever is computed is written there by prefix hash, and whoever needs a prompt looks there first.
type storage struct{ p *process }

// maxStoredBlocks bounds the store, in blocks; the oldest go first.
const maxStoredBlocks = 1 << 20

// finishThreshold ends an answer before it begins: less of the prompt was found than cache_hit_threshold asks for.
const finishThreshold = "cache_threshold"

var errCacheThreshold = errors.New("cache hit threshold not reached")

func newStorage(p *process) wire { return &storage{p} }

func (*storage) stop() {}

func (s *storage) read(_ *call, f *fields) (leg, *apiError) {
	threshold, _ := f.number("cache_hit_threshold")
	if !(threshold >= 0 && threshold <= 1) {
		t := pythonFloat(threshold)
		return nil, badRequest("cache_hit_threshold", "cache_hit_threshold must be in [0, 1], got %s. (parameter=cache_hit_threshold, value=%s)", t, t)
	}
	return &storageLeg{s.p, threshold}, nil
}

// storageLeg is any request: it finds what is stored of its prompt and stores what it computed.
type storageLeg struct {
	p         *process
	threshold float64 // fraction of the prompt that must be found, 0–1
}

// phase goes by the engine's role, for the two legs look alike.
func (l *storageLeg) phase() string {
	if l.p.e.opts.Role == phasePrefill {
		return phasePrefill
	}
	return phasePlain
}

func (l *storageLeg) defers() bool { return false }

func (l *storageLeg) load(ctx context.Context, g *group) (died string, err error) {
	p := l.p
	q := g.seqs[0]
	stored := p.e.registry.blocks.find(q.keys()[q.cached/p.cache.size:])
	found := min(q.cached+len(stored)*p.cache.size, q.prompt)
	if float64(found) < l.threshold*float64(q.prompt) {
		return "", errCacheThreshold
	}
	return "", p.loadFound(ctx, g, p.e.registry.blocks.find, Pull{From: "store"}, p.e.timing.transferPerToken)
}

func (l *storageLeg) done(_ context.Context, g *group) (member string, value json.RawMessage, err error) {
	for _, q := range g.seqs {
		if q.sibling == nil {
			keys, contents := l.p.fullBlocks(q)
			l.p.e.registry.blocks.put(keys, contents)
		}
	}
	return "", nil, nil
}

func (l *storageLeg) left(*group) {}

// loadFound fills the blocks that find knows and the prefix cache does not, and takes the time of moving them.
func (p *process) loadFound(ctx context.Context, g *group, find func(keys []uint64) []uint64, rec Pull, perToken time.Duration) error {
	rec.RequestID, rec.To = g.id, p.e.opts.Name
	for _, q := range g.seqs {
		if q.sibling != nil {
			continue
		}
		n := p.storeCached(q, find(q.keys()[q.cached/p.cache.size:]))
		rec.Blocks += n
		rec.Tokens += n * p.cache.size
		rec.Wrong = rec.Wrong || q.wrong != 0
	}
	p.mu.Lock()
	p.meter.add(metricSlots().externalHits, float64(rec.Tokens))
	p.mu.Unlock()
	if rec.Blocks == 0 {
		return nil
	}
	var sl sleeper
	defer sl.close()
	if err := sl.orGone(ctx, p.e.timing.transferFixed+time.Duration(rec.Tokens)*perToken); err != nil {
		return err
	}
	rec.At, rec.Bytes = time.Now(), rec.Blocks*p.cache.size*bytesPerToken
	p.e.records.pull(rec)
	return nil
}

// fullBlocks are the keys of the prompt's full blocks and what the blocks hold.
func (p *process) fullBlocks(q *sequence) (keys, contents []uint64) {
	p.mu.Lock()
	defer p.mu.Unlock()
	n := min(q.prompt/p.cache.size, len(q.blocks))
	keys = q.keys()[:n]
	for _, id := range q.blocks[:n] {
		contents = append(contents, p.cache.blocks[id].content)
	}
	return keys, contents
}

// belowThreshold answers a request of which too little is cached: no token, at once.
func (p *process) belowThreshold(x *exchange, out *writer, g *group) {
	for _, q := range g.seqs {
		q.finish = finishThreshold
	}
	if !x.call.stream {
		x.answerJSON(out.whole(nil))
		return
	}
	for _, q := range g.seqs {
		if out.head(q) != nil || out.token(q, 0, "") != nil {
			return
		}
	}
	out.end()
}
