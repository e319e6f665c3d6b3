// SPDX-License-Identifier: Apache-2.0

package extproc

import (
	"context"
	"sync"
	"sync/atomic"

	"google.golang.org/grpc/peer"

	"github.com/baton-epp/baton/director"
)

// maxGateways bounds how many gateway connections are remembered; beyond it all is learned anew.
const maxGateways = 4096

// gateways remembers, per gateway connection, in which situations its streams end in order. Envoy ends a stream on which
// it waited for the response's end with END_STREAM and a reset right behind it, one that it needs no more of with the
// reset alone. gRPC tells the first apart only when its reader was waiting already: for a quick response either may
// be reported. So what a connection once ended in order is taken to end in order from then on. Safe for concurrent use.
type gateways struct {
	known sync.Map // remote address → *gateway
	count atomic.Int32
}

// gateway is one connection: the situations (see situation) in which an orderly end was seen.
type gateway [4]atomic.Bool

// situation tells streams apart that the same gateway may end differently: with or without response headers, with or
// without a request body.
func (st *stream) situation() int {
	s := 0
	if st.response.headers {
		s |= 1
	}
	if st.in.HasBody {
		s |= 2
	}
	return s
}

// of returns what is known of the stream's connection.
func (g *gateways) of(ctx context.Context) *gateway {
	p, ok := peer.FromContext(ctx)
	if !ok {
		return new(gateway)
	}
	address := p.Addr.String()
	if known, ok := g.known.Load(address); ok {
		return known.(*gateway) //nolint:forcetypeassert // the only type stored
	}
	if g.count.Add(1) > maxGateways {
		g.known.Clear()
		g.count.Store(1)
	}
	known, _ := g.known.LoadOrStore(address, new(gateway))
	return known.(*gateway) //nolint:forcetypeassert // the only type stored
}

// end says which of the ways to see a request's end this stream's gateway offers (docs/design.md 5.1), and counts it.
func (st *stream) end() director.End {
	if st.exchange == nil || !st.requestOver || st.immediate {
		return director.EndUnanswered
	}
	if st.response.over || (st.response.messages > 0 && st.responseMode != modeNone) {
		st.server.metrics.visibility("bodies")
		return director.EndSeen
	}
	orderly := &st.server.gateways.of(st.grpc.Context())[st.situation()]
	if st.response.eof && !orderly.Load() {
		orderly.Store(true)
	}
	if orderly.Load() && !st.response.drained {
		st.server.metrics.visibility("end")
		return director.EndSeen
	}
	// A reset after our last answer is how Envoy ends a stream it needs no more of; it is never a client's abort.
	st.server.metrics.visibility("none")
	return director.EndUnseen
}
