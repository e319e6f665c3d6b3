// SPDX-License-Identifier: Apache-2.0

package simulate

import (
	"context"
	"encoding/json"
	"net/http"
)

// wire is how the engines of one kind move KV blocks from a prefill to a decode leg. A process has one per rank, made
// when it starts. Its methods are called without process.mu held and are safe for concurrent use. NIXL,
// pull and push, is older than this interface and has none: see transfer.go and lease.go.
type wire interface {
	// read looks at what a request's body says about the transfer; nil for a plain request. It takes no part yet: the
	// request may be refused, or answered by a fault, without reaching the engine. What a real engine refuses at once
	// is an error. Fields of a wrong type are answered 400 without it.
	read(c *call, f *fields) (leg, *apiError)
	// stop forgets everything without freeing: the process has ended, and the contexts of its requests with it.
	stop()
}

// leg is one request's part in a transfer: the prefill leg or the decode leg. Exactly one of done and left is called.
type leg interface {
	// phase is phasePrefill or phaseTransfer, as fault rules and records name it.
	phase() string
	// load is called when the request has its blocks, before anything is computed: a decode leg waits for its blocks
	// and fills them ([process.receive]), or leaves them as they are to be computed here. errLoadFailed follows the
	// engine's load-failure policy, errClientGone is for ctx ended, an *apiError is the answer. died names why the
	// engine process ends, "" for not at all.
	load(ctx context.Context, g *group) (died string, err error)
	// done is called after the last token, before the answer is written: a prefill leg takes over the blocks of g
	// ([process.keep], which sets their sequences' blocks to nil) or waits until they were fetched. Blocks that stay in
	// g are freed afterwards. member and value are put at the top level of an answer that is not streamed; member ""
	// is none.
	done(ctx context.Context, g *group) (member string, value json.RawMessage, err error)
	// left is called when the request ended otherwise: its client left, or it failed. g still has its blocks, which are
	// freed afterwards; it is nil when the request never reached the engine (validation, a full queue, a fault).
	left(g *group)
}

// deferrer is a leg that says whether its load waits outside the batch, counted as deferred. Without it, decode legs do
// and prefill legs do not.
type deferrer interface{ defers() bool }

// shaper is a leg that rewrites the whole JSON answer, after member and value were added. odd is what a fault makes of a
// handle that goes out.
type shaper interface {
	shape(body []byte, odd func(json.RawMessage) json.RawMessage) []byte
}

// sideServer is a wire with an HTTP server of its own, on [Options.SidePort]. [Engine.BootstrapPort] tells its port.
type sideServer interface{ sideHandler() http.Handler }

// memberTransfer is where vLLM's connectors have their parameters, in bodies and in answers.
const memberTransfer = "kv_transfer_params"

// defers reports whether l's load waits outside the batch.
func defers(l leg) bool {
	if l == nil {
		return false
	}
	if d, ok := l.(deferrer); ok {
		return d.defers()
	}
	return l.phase() == phaseTransfer
}

// readLeg lets the wire look at c, which may have been refused already. It returns what the wire refuses.
func (p *process) readLeg(c *call) *apiError {
	if c == nil || p.wire == nil {
		return nil
	}
	f := c.fields
	before := f.err
	l, bad := p.wire.read(c, f)
	c.transfer, c.leg, c.phase = nil, l, phasePlain
	if l != nil {
		c.phase = l.phase()
	}
	if before == nil && f.err != nil {
		return f.err
	}
	return bad
}

// params is an object of the body by name, from the top level or from sampling_params.extra_args.
func (c *call) params(name string) *fields {
	for _, from := range []*fields{c.fields, c.extra} {
		if from == nil {
			continue
		}
		if sub := from.object(name); sub != nil {
			return sub
		}
	}
	return nil
}

// forsake tells the leg of a request that never reached the engine.
func (c *call) forsake() {
	if c != nil && c.leg != nil {
		c.leg.left(nil)
	}
}

// addMember puts a member at the end of a JSON object.
func addMember(body []byte, name string, value json.RawMessage) []byte {
	if name == "" || len(value) == 0 || len(body) < 2 {
		return body
	}
	out := append(body[:len(body)-1:len(body)-1], ',')
	if body[len(body)-2] == '{' {
		out = out[:len(out)-1]
	}
	out = append(out, marshal(name)...)
	out = append(out, ':')
	out = append(out, value...)
	return append(out, '}')
}
