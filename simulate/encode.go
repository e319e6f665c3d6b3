// SPDX-License-Identifier: Apache-2.0

package simulate

import (
	"context"
	"slices"
	"sync"
	"time"
)

// Values of [Options.Encoder]; "" is none: every engine encodes its media itself.
const (
	encoderExample = "ec-example" // a store that all engines share, keyed by mm hash
	encoderNIXL    = "ec-nixl"    // handles: ec_transfer_params of an encode leg's answer, given to the consumer
)

// Roles of engines that encode for others.
const (
	roleEncode        = "encode"
	roleEncodePrefill = "encode-prefill"
	roleEncodeAll     = "encode-prefill-decode"
)

// How a media item's embeddings came to an engine: values of [Encoding.How].
const (
	encodedForOthers = "encoded" // computed on an encode leg
	encodedLocally   = "local"   // computed by the engine that uses them
	encodedCached    = "cache"   // still known to the engine
	encodedStored    = "store"   // found in the shared store
	encodedFetched   = "peer"    // read from the encoder that its handle names
)

// maxEncodings bounds an engine's encoder cache and the shared store, in items; the oldest go first.
const maxEncodings = 4096

// encodeOnly reports whether the engine only encodes: it answers one token, which stands for nothing.
func (e *Engine) encodeOnly() bool { return e.opts.Role == roleEncode }

// encodesForOthers reports whether the engine puts what it encodes where others find it.
func (e *Engine) encodesForOthers() bool {
	return slices.Contains([]string{roleEncode, roleEncodePrefill, roleEncodeAll}, e.opts.Role)
}

// encoder is what one process knows about encoded media.
type encoder struct {
	mu    sync.Mutex // guards what follows
	known itemSet    // keys encoded or fetched here
	pins  map[string][]*pin
	shun  map[string]time.Time // peers in quarantine, by host and port
}

// itemSet is a bounded set of keys with a text for each.
type itemSet struct {
	from  map[string]string
	order []string
}

func (s *itemSet) add(key, from string) {
	if s.from == nil {
		s.from = map[string]string{}
	}
	if _, ok := s.from[key]; !ok {
		s.order = append(s.order, key)
	}
	s.from[key] = from
	for len(s.order) > maxEncodings {
		delete(s.from, s.order[0])
		s.order = s.order[1:]
	}
}

// prepareMedia makes c ready for its media: what an encode-only engine leaves out, and the handles in the body.
func (p *process) prepareMedia(c *call) *apiError {
	if p.e.encodeOnly() {
		c.phase, c.maxTokens, c.minTokens, c.natural = phaseEncode, 1, 0, false
	}
	if len(c.media) == 0 {
		return nil
	}
	if params := c.params("ec_transfer_params"); params != nil && p.e.opts.Encoder == encoderNIXL {
		c.encodings = readEncodings(params)
	}
	kind, _ := wireKindOf(p.e.opts.Engine, p.e.opts.Connector)
	for _, m := range c.media {
		switch {
		case m.raw:
		case p.e.opts.Encoder != encoderNIXL || p.e.encodeOnly():
			return badRequest("messages", "You must set `--enable-mm-embeds` to input `%s_embeds`", m.kind)
		case c.phase != phaseTransfer && !kind.blind && c.encodings[m.key] == nil:
			return badRequest("messages", "ec_transfer_params has no valid handle for the %s with uuid %s", m.kind, m.key)
		}
	}
	return nil
}

// encodeMedia gets the embeddings of the items whose KV is not there yet: all of them on an engine that only encodes.
func (p *process) encodeMedia(ctx context.Context, c *call, g *group) error {
	if len(c.media) == 0 {
		return nil
	}
	p.mu.Lock()
	g.state = stateEncode
	q := g.seqs[0]
	have := q.cached + q.remote
	p.mu.Unlock()
	done := map[string]bool{}
	for _, m := range c.media {
		if done[m.key] || (!p.e.encodeOnly() && m.offset+mediaTokens <= have) {
			continue
		}
		done[m.key] = true
		if err := p.encodeOne(ctx, c, m); err != nil {
			return err
		}
	}
	return nil
}

// encodeOne gets the embeddings of one item by the cheapest way there is.
func (p *process) encodeOne(ctx context.Context, c *call, m mediaItem) error {
	rec := Encoding{RequestID: c.id, Key: m.key, Kind: m.kind, From: p.e.opts.Name}
	p.enc.mu.Lock()
	from, known := p.enc.known.from[m.key]
	p.enc.mu.Unlock()
	stored := ""
	if p.e.opts.Encoder == encoderExample {
		stored = p.e.registry.encoding(m.key)
	}
	var sl sleeper
	defer sl.close()
	var err error
	switch {
	case known:
		rec.How, rec.From = encodedCached, from
	case stored != "":
		rec.How, rec.From = encodedStored, stored
		err = sl.orGone(ctx, p.transferTime(mediaTokens))
	case c.encodings[m.key] != nil:
		rec.How = encodedFetched
		rec.From, rec.Err = p.fetchEncoding(ctx, &sl, m.key, c.encodings[m.key])
		if rec.Err != "" {
			err = p.encodeHere(ctx, &sl, m, &rec)
		}
	default:
		err = p.encodeHere(ctx, &sl, m, &rec)
	}
	if ctx.Err() != nil {
		return errClientGone
	}
	p.encoded(rec, err)
	return err
}

// encodeHere spends the time of encoding m, if the body has the media.
func (p *process) encodeHere(ctx context.Context, sl *sleeper, m mediaItem, rec *Encoding) error {
	rec.How, rec.From = encodedLocally, p.e.opts.Name
	if !m.raw {
		rec.How, rec.From = "", ""
		return errInternal
	}
	if p.e.encodeOnly() {
		rec.How = encodedForOthers
	}
	p.mu.Lock()
	d := time.Duration(float64(p.e.timing.encode) * p.stretch())
	p.mu.Unlock()
	return sl.orGone(ctx, d)
}

// orGone sleeps; errClientGone when ctx ended first.
func (s *sleeper) orGone(ctx context.Context, d time.Duration) error {
	if !s.sleep(ctx, d) {
		return errClientGone
	}
	return nil
}

// encoded records how an item's embeddings came, and keeps them.
func (p *process) encoded(rec Encoding, err error) {
	rec.At = time.Now()
	p.e.records.encoding(rec)
	p.mu.Lock()
	p.meter.add(metricSlots().mediaQueries, 1)
	if rec.How == encodedCached {
		p.meter.add(metricSlots().mediaHits, 1)
	}
	p.mu.Unlock()
	if err != nil {
		return
	}
	p.enc.mu.Lock()
	p.enc.known.add(rec.Key, rec.From)
	p.enc.mu.Unlock()
	if p.e.opts.Encoder == encoderExample && p.e.encodesForOthers() {
		p.e.registry.storeEncoding(rec.Key, p.e.opts.Name)
	}
}

// transferTime is what moving the data of n tokens takes.
func (p *process) transferTime(n int) time.Duration {
	return p.e.timing.transferFixed + time.Duration(n)*p.e.timing.transferPerToken
}

// encoding is the engine that put the item into the store of [encoderExample]; "" when it is not there.
func (r *Registry) encoding(key string) string {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.encodings.from[key]
}

func (r *Registry) storeEncoding(key, engine string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.encodings.add(key, engine)
}
