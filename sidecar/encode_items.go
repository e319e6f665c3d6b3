// SPDX-License-Identifier: Apache-2.0

package sidecar

import (
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"hash/fnv"
	"sync/atomic"
	"time"

	"github.com/baton-epp/baton/inference"
	"github.com/baton-epp/baton/pool"
	"github.com/baton-epp/baton/scheduler"
	"github.com/baton-epp/baton/sidecar/connectors"
)

// maxAround is how much beside the content a part may say and still be compared with others; a part may hold thousands of
// items, and each would read all of it.
const maxAround = 4 << 10

// encoding is the encode phase of one request: what is encoded apart, and what came of it.
type encoding struct {
	encoder encoder
	maxAge  time.Duration
	x       connectors.Encoding
	items   []item // different from each other, in body order
	of      []int  // by index in Request.Media: its place in items, -1 for one that is not encoded apart
	equal   int    // media items that are in items already
	skipped int    // media items beyond maxEncoded
	uses    atomic.Int32
}

// item is one media item, and all that are equal to it.
type item struct {
	media int    // the first one's index in Request.Media
	hash  uint64 // of its content
	body  inference.Body

	// Written by whoever sends it; read when the phase is over.
	answered time.Time // zero when it was not encoded
	handle   []byte
}

// newEncoding finds the different items of a request.
func newEncoding(r *run) *encoding {
	req := r.j.Request
	enc := &encoding{
		encoder: r.s.encoder, maxAge: r.s.HandleMaxAge, of: make([]int, len(req.Media)),
		x: connectors.Encoding{
			Request: req, Model: r.j.Model, Keys: make([]string, len(req.Media)),
			// A gateway that may try several decode endpoints sends the same body to each.
			Lean: r.s.Encode.Embeds == "lean" && r.j.Decision.Phase(scheduler.PhaseDecode).Send <= 1,
		},
	}
	known := make(map[identity]int, min(len(req.Media), maxEncoded))
	for i := range req.Media {
		m := &req.Media[i]
		key := connectors.MediaKey(req, i)
		enc.x.Keys[i] = key
		id := identity{key: key}
		if n := m.Part.Len() - m.Span.Len(); n > maxAround {
			id.alone = i + 1
		} else if n > 0 {
			id.around = around(req.Body, m)
		}
		at, found := known[id]
		switch {
		case found:
			enc.equal++
		case len(enc.items) == maxEncoded:
			at = -1
			enc.skipped++
		default:
			at = len(enc.items)
			enc.items = append(enc.items, item{media: i, hash: hashOf(key)})
			known[id] = at
		}
		enc.of[i] = at
	}
	return enc
}

// identity is what two media items must share to be encoded once: the content, and what the part says about it.
type identity struct {
	key    string
	around [sha256.Size]byte
	alone  int // not 0: equal to nothing but itself
}

// around is the digest of a content part without its content.
func around(b inference.Body, m *inference.Media) (sum [sha256.Size]byte) {
	h := sha256.New()
	for _, s := range []inference.Span{{Start: m.Part.Start, End: m.Span.Start}, {Start: m.Span.End, End: m.Part.End}} {
		for _, chunk := range b.Slice(s).Chunks {
			_, _ = h.Write(chunk)
		}
		_, _ = h.Write([]byte{0})
	}
	h.Sum(sum[:0])
	return sum
}

// hashOf is the beginning of a key as a number.
func hashOf(key string) uint64 {
	var b [8]byte
	_, _ = hex.Decode(b[:], []byte(key[:2*len(b)]))
	return binary.BigEndian.Uint64(b[:])
}

// spliceEncoded puts what was encoded into the body of a leg. consumer says that the leg's endpoint uses the embeddings:
// prefill where there is one, decode otherwise.
func (r *run) spliceEncoded(consumer bool, body *inference.Edits) {
	r.out.spliceEncoded(consumer, body)
}

// spliceEncoded does the same once the run is over.
func (out *Outcome) spliceEncoded(consumer bool, body *inference.Edits) {
	if out.encoding != nil {
		out.encoding.splice(consumer, body)
	}
}

// splice leaves out what is so old that its encoder may have dropped it. Raw media is replaced for the first consumer
// only: embeddings may be gone once it has fetched them, and the next one must be able to help itself.
func (enc *encoding) splice(consumer bool, body *inference.Edits) {
	x := enc.x
	if consumer {
		enc.uses.Add(1)
	}
	x.Lean = x.Lean && enc.uses.Load() <= 1
	now := time.Now()
	handles := make([][]byte, len(enc.of))
	for i, at := range enc.of {
		if at >= 0 && now.Sub(enc.items[at].answered) <= enc.maxAge {
			handles[i] = enc.items[at].handle
		}
	}
	enc.encoder.Splice(&x, handles, consumer, body)
}

// home is an encode endpoint that items can be routed to.
type home struct {
	e       *pool.Endpoint
	hash    uint64
	ejected bool // and there was nobody better
}

// homes lists the endpoints that may be asked now. Those ejected are among them only if there are no others.
func (r *run) homes() []home {
	now := time.Now()
	ranked := r.j.Decision.Phase(scheduler.PhaseEncode).Ranked
	all, ejected := make([]home, 0, len(ranked)), []home(nil)
	for i := range ranked {
		e := r.usableEncoder(ranked[i].Endpoint, now)
		if e == nil {
			continue
		}
		h := fnv.New64a()
		_, _ = h.Write([]byte(e.UID + " " + e.Hostport))
		if e.Health.Standing(now) == pool.Ejected {
			ejected = append(ejected, home{e, h.Sum64(), true})
		} else {
			all = append(all, home{e: e, hash: h.Sum64()})
		}
	}
	if len(all) == 0 {
		return ejected
	}
	return all
}

// usableEncoder returns the endpoint as the snapshot has it now, or nil when it must not be asked.
func (r *run) usableEncoder(ranked *pool.Endpoint, now time.Time) *pool.Endpoint {
	e := r.o.snapshot().ByAddr(ranked.Addr)
	if e == nil || e.UID != ranked.UID || e.Role != 0 && !e.Role.Has(pool.RoleEncode) ||
		e.Engine != r.engine() || e.Health.Standing(now) == pool.NotReady || !r.o.peers.ready(e, nil, now) {
		return nil
	}
	return e
}

// best is the home of an item by rendezvous hashing, so that every replica sends the same image to the endpoint that has
// it cached, and an endpoint that comes or goes moves its own items only. Those tried do not count; -1 = none is left.
func best(homes []home, hash uint64, tried []bool) int {
	at, most := -1, uint64(0)
	for i := range homes {
		if tried != nil && tried[i] {
			continue
		}
		if weight := mix(hash ^ homes[i].hash); at < 0 || weight > most {
			at, most = i, weight
		}
	}
	return at
}

// mix spreads a number's bits (splitmix64's finalizer).
func mix(x uint64) uint64 {
	x = (x ^ x>>30) * 0xbf58476d1ce4e5b9
	x = (x ^ x>>27) * 0x94d049bb133111eb
	return x ^ x>>31
}
