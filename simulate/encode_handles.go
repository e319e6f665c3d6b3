// SPDX-License-Identifier: Apache-2.0

package simulate

import (
	"context"
	"encoding/json"
	"net"
	"slices"
	"strconv"
	"time"
)

// The handles of encoded media. An encoder pins what it encoded and answers where it is; the consumer reads it once,
// which frees it. Nobody else can: what is not read in time is a leak.

// Real times of the encoder connector, before scaling.
const (
	pinTime    = 30 * time.Second       // how long an encoder keeps what nobody reads
	ackWait    = 2 * time.Second        // for a peer's first sign
	readLimit  = 20 * time.Second       // for the data, retries of NOT_READY included
	retryWait  = 100 * time.Millisecond // between those
	quarantine = 60 * time.Second       // of a peer that did not answer
)

// encoderPortOffset is between an engine's NIXL port and that of its encoder connector (VLLM_EC_SIDE_CHANNEL_PORT 5601).
const encoderPortOffset = 1

// Values of [Faults.Encoder]: what an encoder answers to those who want to read from it.
const (
	nackNotReady = "NOT_READY" // retried until the read limit
	nackMissing  = "MISSING"
	nackIncompat = "INCOMPAT"
	nackVersion  = "VERSION"
	nackInternal = "INTERNAL"
	nackSilent   = "silent" // no acknowledgement
	nackStall    = "stall"  // acknowledged, and then no data
)

func encoderFaults() []string {
	return []string{"", nackNotReady, nackMissing, nackIncompat, nackVersion, nackInternal, nackSilent, nackStall}
}

// pin is one item kept for one request's consumer.
type pin struct {
	rec   Pin
	timer *time.Timer
}

// encodingHandle is one value of ec_transfer_params.
type encodingHandle struct {
	Metadata json.RawMessage `json:"metadata"`
	Items    []int           `json:"item_indices"`
	Host     string          `json:"peer_host"`
	Port     int             `json:"peer_port"`
	Size     int             `json:"size_bytes"`
}

// readEncodings reads the handles of a body; those that lack a field are left out.
func readEncodings(f *fields) map[string]*encodingHandle {
	out := map[string]*encodingHandle{}
	for key := range f.m {
		sub := f.object(key)
		if sub == nil {
			continue
		}
		h := encodingHandle{Host: sub.text("peer_host")}
		h.Port, _ = sub.integer("peer_port")
		h.Size, _ = sub.integer("size_bytes")
		if sub.err == nil && h.Host != "" && h.Port > 0 && h.Size > 0 && sub.object("metadata") != nil {
			out[key] = &h
		}
	}
	return out
}

// pinEncodings keeps the items of a finished encode leg for those who will read them and returns ec_transfer_params.
func (p *process) pinEncodings(x *exchange, c *call) json.RawMessage {
	if p.e.opts.Encoder != encoderNIXL || !p.e.encodeOnly() || len(c.media) == 0 {
		return nil
	}
	out := map[string]json.RawMessage{}
	handles := map[string]*encodingHandle{}
	for i, m := range c.media {
		if h := handles[m.key]; h != nil {
			h.Items = append(h.Items, i)
			continue
		}
		handles[m.key] = &encodingHandle{
			Metadata: mediaGrid(m.kind), Items: []int{i}, Host: p.e.remoteHost(), Port: p.sidePort() + encoderPortOffset,
			Size: mediaTokens * bytesPerToken,
		}
		p.pinEncoding(c.id, m.key)
	}
	for key, h := range handles {
		if raw := x.oddHandle(marshal(h)); raw != nil {
			out[key] = raw
		}
	}
	if c.stream || len(out) == 0 {
		return nil
	}
	return marshal(out)
}

// mediaGrid is the metadata that stands in the place of an item where only placeholders are counted.
func mediaGrid(kind string) json.RawMessage {
	if kind == "audio" {
		return json.RawMessage(`{"audio_feature_lengths":[64]}`)
	}
	return json.RawMessage(`{"` + kind + `_grid_thw":[[1,16,16]]}`)
}

func (p *process) pinEncoding(request, key string) {
	d := p.scaled(pinTime)
	now := time.Now()
	one := &pin{rec: Pin{Engine: p.e.opts.Name, RequestID: request, Key: key, Bytes: mediaTokens * bytesPerToken, Since: now, Expires: now.Add(d)}}
	p.enc.mu.Lock()
	defer p.enc.mu.Unlock()
	if p.enc.pins == nil {
		p.enc.pins = map[string][]*pin{}
	}
	p.enc.pins[key] = append(p.enc.pins[key], one)
	one.timer = time.AfterFunc(d, func() {
		p.enc.mu.Lock()
		defer p.enc.mu.Unlock()
		i := slices.Index(p.enc.pins[key], one)
		if i < 0 {
			return
		}
		one.rec.At = time.Now()
		p.e.records.leakedEncoding(one.rec) // first, so that whoever sees no pin sees the leak
		p.dropPinLocked(key, i)
	})
}

func (p *process) dropPinLocked(key string, i int) {
	p.enc.pins[key][i].timer.Stop()
	p.enc.pins[key] = slices.Delete(p.enc.pins[key], i, i+1)
	if len(p.enc.pins[key]) == 0 {
		delete(p.enc.pins, key)
	}
}

// readPin frees the oldest pin of key; false when there is none.
func (p *process) readPin(key string) bool {
	p.enc.mu.Lock()
	defer p.enc.mu.Unlock()
	if len(p.enc.pins[key]) == 0 {
		return false
	}
	p.dropPinLocked(key, 0)
	return true
}

func (p *process) hasPin(key string) bool {
	p.enc.mu.Lock()
	defer p.enc.mu.Unlock()
	return len(p.enc.pins[key]) > 0
}

// stopPins forgets the pins without a leak: the process has ended.
func (e *encoder) stopPins() {
	e.mu.Lock()
	defer e.mu.Unlock()
	for _, list := range e.pins {
		for _, one := range list {
			one.timer.Stop()
		}
	}
	e.pins = nil
}

// fetchEncoding reads an item from the encoder that its handle names. why is "" when it worked.
func (p *process) fetchEncoding(ctx context.Context, sl *sleeper, key string, h *encodingHandle) (from, why string) {
	name := net.JoinHostPort(h.Host, strconv.Itoa(h.Port))
	if p.shunned(name) {
		return "", "peer in quarantine"
	}
	peer, _ := p.e.registry.dial(p, h.Host, h.Port-encoderPortOffset)
	if peer == nil || peer.e.Faults().Encoder == nackSilent {
		sl.sleep(ctx, p.scaled(ackWait))
		return "", p.shunPeer(name, "no acknowledgement")
	}
	if why := p.askPeer(ctx, sl, peer, key); why != "" {
		return peer.e.opts.Name, why
	}
	wait := p.transferTime(mediaTokens)
	if peer.e.Faults().Encoder == nackStall || wait > p.scaled(readLimit) {
		sl.sleep(ctx, p.scaled(readLimit))
		return peer.e.opts.Name, p.shunPeer(name, "read timed out")
	}
	sl.sleep(ctx, wait)
	switch {
	case !peer.alive():
		return peer.e.opts.Name, p.shunPeer(name, "peer gone")
	case ctx.Err() != nil:
		return peer.e.opts.Name, "client gone" // what was not read stays pinned
	case !peer.readPin(key):
		return peer.e.opts.Name, nackMissing
	}
	return peer.e.opts.Name, ""
}

// askPeer asks for an item until the peer is ready; it returns the refusal.
func (p *process) askPeer(ctx context.Context, sl *sleeper, peer *process, key string) string {
	for end := time.Now().Add(p.scaled(readLimit)); ; {
		switch nack := peer.e.Faults().Encoder; nack {
		case nackNotReady:
			if time.Now().After(end) || !sl.sleep(ctx, max(p.scaled(retryWait), time.Millisecond)) {
				return nack
			}
		case nackMissing, nackIncompat, nackVersion, nackInternal:
			return nack
		default:
			if !peer.hasPin(key) {
				return nackMissing
			}
			return ""
		}
	}
}

// alive reports whether the process still runs.
func (p *process) alive() bool { return p.e.running() == p.front }

func (p *process) shunned(name string) bool {
	p.enc.mu.Lock()
	defer p.enc.mu.Unlock()
	return time.Now().Before(p.enc.shun[name])
}

// shunPeer puts a peer into quarantine. It returns why.
func (p *process) shunPeer(name, why string) string {
	p.enc.mu.Lock()
	defer p.enc.mu.Unlock()
	if p.enc.shun == nil || len(p.enc.shun) >= maxEncodings { // a client may name any peer
		p.enc.shun = map[string]time.Time{}
	}
	p.enc.shun[name] = time.Now().Add(p.scaled(quarantine))
	return why
}
