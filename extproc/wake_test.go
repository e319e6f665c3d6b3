// SPDX-License-Identifier: Apache-2.0

package extproc

import (
	"context"
	"errors"
	"io"
	"strings"
	"testing"
	"time"

	extprocv3 "github.com/envoyproxy/go-control-plane/envoy/service/ext_proc/v3"
	"github.com/prometheus/client_golang/prometheus/testutil"

	"github.com/baton-epp/baton/director"
	"github.com/baton-epp/baton/inference"
	"github.com/baton-epp/baton/sidecar"
)

// TestHeldHeadGoesOnAtTheEndOfTheServer: the stream is about to be cut, and the head with it.
func TestHeldHeadGoesOnAtTheEndOfTheServer(t *testing.T) {
	for name, modes := range everyMode {
		t.Run(name, func(t *testing.T) {
			r := newRendezvous(t, sglang)
			r.hold.Store(int64(time.Minute))
			c := r.streamed(modes)
			c.send(responseHeadersMessage("200", ""))
			r.server.Cut()
			m, err := c.stream.Recv()
			if modes[1] == modeNone && errors.Is(err, io.EOF) {
				err = nil // the end came before the head, which then goes on, too
			} else if m.GetResponseHeaders() == nil {
				t.Fatalf("want the header answer, got %v, %v", m, err)
			}
			if err != nil {
				t.Fatal(err)
			}
			r.say <- "200 {}"
			c.cancel()
			eventually(t, "released", func() bool { return r.snapshot.Endpoints[0].Load.Requests() == 0 && r.server.Streams() == 0 })
		})
	}
}

// lame panics when it is to take over what a prefill came to.
type lame struct{ scripted }

func (*lame) Settle(context.Context, *sidecar.Job, *sidecar.Outcome) error {
	panic("a connector's bug")
}

// nowhere is a stream with a context only.
type nowhere struct {
	extprocv3.ExternalProcessor_ProcessServer
	ctx context.Context //nolint:containedctx // of a gRPC stream
}

func (n nowhere) Context() context.Context { return n.ctx }

// TestPanicInAPrefillBesideDecode is an answer to the client, in quiet mode, too, where the stream's end alone would let the
// response go on.
func TestPanicInAPrefillBesideDecode(t *testing.T) {
	k := newKit(t, kitOptions{snapshot: three(), orchestrat: &lame{}})
	var body inference.Body
	body.Append([]byte(chat))
	x, err := k.server.opts.Director.Begin(&director.Incoming{
		Headers: inference.Headers{{Name: ":path", Value: "/v1/chat/completions"}, {Name: ":method", Value: "POST"}}, Body: body, HasBody: true, Start: time.Now(),
	})
	if err != nil {
		t.Fatal(err)
	}
	defer x.Done(director.EndUnanswered)
	st := &stream{server: k.server, grpc: nowhere{ctx: t.Context()}, exchange: x}
	if err := st.settle(); !errors.Is(err, errPanic) || testutil.ToFloat64(k.server.metrics.panics) != 1 {
		t.Errorf("%v, %v panics", err, testutil.ToFloat64(k.server.metrics.panics))
	}
}

// TestPaceIsLearnedFromBodies: from the first chunk that comes while the response is made, not from its head.
func TestPaceIsLearnedFromBodies(t *testing.T) {
	for name, modes := range everyMode {
		t.Run(name, func(t *testing.T) {
			k := newKit(t, kitOptions{snapshot: three()})
			c := k.open()
			long := strings.Replace(chat, "{", `{"stream":true,"user":"`+strings.Repeat("x", 64)+`",`, 1)
			long = strings.Replace(long, `"content":"`, `"content":"`+strings.Repeat("word ", 4<<10), 1)
			if modes[0] == modeBuffered {
				c.send(first{modes: modesOf(modes[0], modes[1])}.message(t))
				c.recv()
				c.send(bodyMessage([]byte(long), true))
				c.recv()
			} else {
				c.duplex(first{modes: modesOf(modes[0], modes[1])}, []byte(long))
			}
			c.send(responseHeadersMessage("200", ""))
			c.recv()
			learned := func() (n int) {
				for _, e := range k.snapshot.Endpoints {
					if e.Pace.TokensPerSecond() > 0 {
						n++
					}
				}
				return n
			}
			if learned() != 0 {
				t.Error("learned from the head")
			}
			if modes[1] == modeNone {
				c.cancel()
				return
			}
			c.send(responseBodyMessage([]byte("data: {}\n\n"), false))
			c.recv()
			if want := 1 - btoi(modes[1] == modeBuffered); int64(learned()) != want {
				t.Errorf("learned of %d endpoints, want %d", learned(), want)
			}
			c.cancel()
		})
	}
}
