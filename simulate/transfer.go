// SPDX-License-Identifier: Apache-2.0

package simulate

import (
	"bytes"
	"context"
	"encoding/json"
	"log/slog"
	"time"
)

// transfer is a request's kv_transfer_params.
type transfer struct {
	raw             json.RawMessage
	doRemoteDecode  bool
	doRemotePrefill bool
	blocks          []int64 // of all groups
	hasBlocks       bool    // remote_block_ids is an array
	push            bool    // transfer_mode push: the blocks are found by the request id
	engineID        string
	requestID       string
	host            string
	port            int
	tpSize          int
	cachedTokens    int // remote_prefill_cached_tokens
}

// flaw is what a real decode engine makes of a handle that is not whole.
type flaw int

const (
	flawNone    flaw = iota
	flawDies         // the engine process ends with an AssertionError
	flawHangs        // the request waits for ever; when its client leaves the engine dies with a KeyError
	flawIgnored      // a warning, and everything is computed locally
)

func (t *transfer) flaw(ownTP int) flaw {
	switch {
	case !t.hasBlocks && !t.push, t.tpSize > ownTP:
		return flawDies
	case t.engineID == "", t.host == "", t.port == 0:
		return flawIgnored
	case t.requestID == "":
		return flawHangs
	case len(t.blocks) == 0 && !t.push:
		return flawIgnored
	}
	return flawNone
}

// bytesPerToken is the size of the KV of one token, as in the captures: 458752 bytes for 7 blocks of 32.
const bytesPerToken = 2048

// transferPush is transfer_mode of a handle whose blocks the prefill engine writes once the decode engine has registered
// its own.
const transferPush = "push"

// heartbeats per lease; each extends the lease by two thirds of it.
const heartbeats = 6

// pull fetches the blocks of g's handle. It returns false when the pull failed. died names why the engine process ends.
func (p *process) pull(ctx context.Context, g *group) (ok bool, died string) {
	t := g.remote
	peer, wait := p.reach(t)
	var sl sleeper
	defer sl.close()
	if peer == nil {
		sl.sleep(ctx, p.scaled(wait))
		return p.pullFailed(t.requestID, "prefill engine not reached"), ""
	}
	peer.extend(t.requestID)
	if wait > 0 && !sl.sleep(ctx, wait) {
		return false, "" // left during the handshake; abort notifies
	}
	ids := t.blocks
	if t.push {
		if ids, ok = peer.awaitLease(ctx, t.requestID, p.e.timing.lease); !ok {
			return p.pullFailed(t.requestID, "registered, and nothing was written"), ""
		}
	}
	ok, died = p.receive(g, peer, ids, Pull{RequestID: t.requestID, Verbatim: peer.verbatim(t)})
	if ok {
		peer.notify(t.requestID)
	}
	return ok, died
}

// receive copies what peer's blocks ids hold into g's, the prefix that g has already left out, and records the pull;
// rec says what is known of it. It takes the transfer's time, which the client's leaving does not shorten. It returns
// false, the failure recorded, when peer has ended or has no such blocks. died names why p's engine process ends.
func (p *process) receive(g *group, peer *process, ids []int64, rec Pull) (ok bool, died string) {
	tokens := 0
	for _, q := range g.seqs {
		tokens = max(tokens, q.prompt-q.cached)
	}
	<-time.NewTimer(p.e.timing.transferFixed + time.Duration(tokens)*p.e.timing.transferPerToken).C
	contents, inside := peer.read(ids)
	if contents == nil {
		return p.pullFailed(rec.RequestID, "prefill engine gone"), ""
	}
	if !inside {
		return p.pullFailed(rec.RequestID, "block ids out of range"), ""
	}
	rec.From, rec.runs = peer.e.opts.Name, runsOf(ids)
	return p.store(g, contents, rec)
}

// runsOf counts the runs of neighbouring blocks.
func runsOf(ids []int64) int {
	n := 0
	for i, id := range ids {
		if i == 0 || id != ids[i-1]+1 {
			n++
		}
	}
	return n
}

// reach finds the engine that a handle names, shaking hands at first contact. wait is how long the handshake takes, or
// how long it takes to fail.
func (p *process) reach(t *transfer) (peer *process, wait time.Duration) {
	p.mu.Lock()
	_, known := p.agents[t.engineID]
	p.mu.Unlock()
	if known { // host and port are not looked at again
		if peer = p.e.registry.byID(t.engineID); peer != nil {
			return peer, 0
		}
		return nil, waitGone
	}
	peer, wait = p.e.registry.dial(p, t.host, t.port)
	if peer == nil {
		return nil, wait
	}
	if peer.id != t.engineID && (!p.e.opts.MixRanks || !peer.hasRank(t.engineID)) {
		return nil, waitWrongEngine
	}
	return peer, p.greet(peer)
}

// greet is the first contact with an engine, once; it returns what the handshake takes.
func (p *process) greet(peer *process) time.Duration {
	p.mu.Lock()
	defer p.mu.Unlock()
	if _, known := p.agents[peer.id]; known {
		return 0
	}
	p.agents[peer.id] = struct{}{}
	return p.e.timing.handshake
}

// read copies what blocks hold; nil when the process has ended.
func (p *process) read(ids []int64) ([]blockContent, bool) {
	if p.e.running() != p.front {
		return nil, false
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	out, ok := p.cache.peek(ids)
	if !ok {
		return []blockContent{}, false
	}
	return out, true
}

// store puts pulled blocks in place and records the pull. contents are a prompt's last blocks, its full ones and the
// one that is not.
func (p *process) store(g *group, contents []blockContent, rec Pull) (ok bool, died string) {
	rec.At, rec.To = time.Now(), p.e.opts.Name
	p.mu.Lock()
	for _, q := range g.seqs {
		n := len(q.blocks) - q.cached/p.cache.size
		if n > len(contents) {
			p.mu.Unlock()
			return false, "AssertionError: more local blocks than remote ones"
		}
		p.storeOne(q, contents[len(contents)-n:])
		rec.Tokens += q.remote
		rec.Blocks += n
		rec.Wrong = rec.Wrong || q.wrong != 0
	}
	p.flush()
	rec.Bytes = rec.Blocks * p.cache.size * bytesPerToken
	p.meter.pulled(rec, p.e.timing)
	p.mu.Unlock()
	p.e.records.pull(rec)
	return true, ""
}

func (p *process) storeOne(q *sequence, contents []blockContent) {
	first := q.cached / p.cache.size
	for i, c := range contents {
		at := first + i
		parent := q.root
		if at > 0 && at <= len(q.chain) {
			parent = q.chain[at-1]
		}
		want := q.tokens[at*p.cache.size : min((at+1)*p.cache.size, len(q.tokens))]
		full := chainHash(parent, want)
		if !c.holds(parent, want, full) {
			q.wrong ^= mix(c.content+uint64(i)) | 1
			full = c.content
		}
		key := uint64(0)
		if at < len(q.chain) {
			key = q.key(q.chain[at])
		}
		p.cache.fill(q.blocks[at], key, full)
	}
	p.announce(q, first, 0)
	q.pulled = len(q.blocks)
	q.remote = q.prompt - q.cached
}

// pullFailed records a failed pull of the blocks that id names. It returns false.
func (p *process) pullFailed(id, why string) bool {
	p.mu.Lock()
	p.meter.add(metricSlots().failedTransfers, 1)
	p.mu.Unlock()
	p.e.records.pull(Pull{At: time.Now(), To: p.e.opts.Name, RequestID: id, Err: why})
	p.e.log.Debug("pull failed", slog.String("request_id", id), slog.String("reason", why))
	return false
}

func (p *process) scaled(d time.Duration) time.Duration {
	return time.Duration(float64(d) * p.e.opts.Scale)
}

// verbatim reports whether t is, byte for byte, the handle that this process gave out.
func (p *process) verbatim(t *transfer) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	l := p.leases[t.requestID]
	return l != nil && bytes.Equal(bytes.TrimSpace(l.raw), bytes.TrimSpace(t.raw))
}

// heartbeat extends the lease behind a handle that waits here.
func (e *Engine) heartbeat(t *transfer) {
	if peer := e.registry.byID(t.engineID); peer != nil {
		peer.extend(t.requestID)
	}
}

// letGo tells the prefill engine that nobody will read the blocks of a handle: vLLM's empty-read notification.
func (e *Engine) letGo(t *transfer) {
	if t == nil || t.requestID == "" {
		return
	}
	if peer := e.registry.byID(t.engineID); peer != nil {
		peer.notify(t.requestID)
	}
}
