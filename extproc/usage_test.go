// SPDX-License-Identifier: Apache-2.0

package extproc

import (
	"bytes"
	"context"
	"strings"
	"testing"

	procv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/http/ext_proc/v3"
	extprocv3 "github.com/envoyproxy/go-control-plane/envoy/service/ext_proc/v3"
	"github.com/prometheus/client_golang/prometheus/testutil"

	"github.com/baton-epp/baton/director"
	"github.com/baton-epp/baton/internal/alloctest"
	"github.com/baton-epp/baton/sidecar"
)

const (
	wholeAnswer = `{"choices":[{"message":{"content":"\"cached_tokens\":104"}}],"usage":{"prompt_tokens":104,"prompt_tokens_details":{"cached_tokens":104}}}`
	wholeRight  = `{"choices":[{"message":{"content":"\"cached_tokens\":104"}}],"usage":{"prompt_tokens":104,"prompt_tokens_details":{"cached_tokens":16 }}}`
	streamStart = "data: {\"choices\":[{\"delta\":{\"content\":\" cached_tokens\"},\"finish_reason\":null}]}\n\n"
	streamDone  = "\n\ndata: [DONE]\n\n"
)

// prefilledWith is a kit whose requests were all prefilled elsewhere, with so many tokens found there.
func prefilledWith(t *testing.T, out sidecar.Outcome) *kit {
	t.Helper()
	return newKit(t, kitOptions{snapshot: three(), orchestrat: &scripted{run: func(context.Context, *sidecar.Job) (*sidecar.Outcome, error) {
		o := out
		return &o, nil
	}}})
}

func claimed(cached int64) sidecar.Outcome {
	return sidecar.Outcome{Name: "disaggregated", HasHandle: true, CachedTokens: cached}
}

// answered shows the picker a response and returns what the client gets, by the messages' answers.
func (c *call) answered(mode procv3.ProcessingMode_BodySendMode, headers []string, trailers bool, chunks ...string) string {
	c.t.Helper()
	h := responseHeadersMessage("200", "")
	h.GetResponseHeaders().Headers.Headers = append(h.GetResponseHeaders().GetHeaders().GetHeaders(), headerMap(headers...).GetHeaders()...)
	c.send(h)
	if c.recv().GetResponseHeaders() == nil {
		c.t.Fatal("want the header answer")
	}
	var got bytes.Buffer
	take := func(m *extprocv3.ProcessingResponse, chunk string, last bool) {
		switch mutation := m.GetResponseBody().GetResponse().GetBodyMutation().GetMutation().(type) {
		case *extprocv3.BodyMutation_StreamedResponse:
			if mode != modeDuplex || mutation.StreamedResponse.GetEndOfStream() != last {
				c.t.Errorf("%v: answer %v to %q", mode, mutation, chunk)
			}
			got.Write(mutation.StreamedResponse.GetBody())
		case *extprocv3.BodyMutation_Body:
			if len(mutation.Body) == 0 || mode == modeDuplex {
				c.t.Errorf("%v: answer %v to %q", mode, mutation, chunk)
			}
			got.Write(mutation.Body)
		case *extprocv3.BodyMutation_ClearBody:
		default:
			if mode == modeDuplex || m.GetResponseBody() == nil {
				c.t.Errorf("%v: answer %v to %q", mode, m, chunk)
			}
			got.WriteString(chunk)
		}
	}
	for i, chunk := range chunks {
		last := i == len(chunks)-1 && !trailers
		c.send(&extprocv3.ProcessingRequest{Request: &extprocv3.ProcessingRequest_ResponseBody{
			ResponseBody: &extprocv3.HttpBody{Body: []byte(chunk), EndOfStream: last},
		}})
		take(c.recv(), chunk, last)
	}
	if trailers {
		c.send(&extprocv3.ProcessingRequest{Request: &extprocv3.ProcessingRequest_ResponseTrailers{ResponseTrailers: &extprocv3.HttpTrailers{}}})
		m := c.recv()
		if m.GetResponseBody() != nil {
			take(m, "", false)
			m = c.recv()
		}
		if m.GetResponseTrailers() == nil {
			c.t.Errorf("want the trailers answer last, got %v", m)
		}
	}
	return got.String()
}

// bytewise cuts a text everywhere.
func bytewise(text string) []string { return strings.Split(text, "") }

func TestCachedTokensAreThePrefills(t *testing.T) {
	wrong := streamStart + `data: {"choices":[],"usage":{"prompt_tokens":104,"prompt_tokens_details":{"cached_tokens":104}}}` + streamDone
	right := streamStart + `data: {"choices":[],"usage":{"prompt_tokens":104,"prompt_tokens_details":{"cached_tokens":16 }}}` + streamDone
	cut := strings.Index(wrong, "04}")
	for name, mode := range map[string]procv3.ProcessingMode_BodySendMode{"duplex": modeDuplex, "streamed": modeStreamed, "buffered": modeBuffered} {
		t.Run(name, func(t *testing.T) {
			k := prefilledWith(t, claimed(16))
			f := func(want string, trailers bool, chunks ...string) {
				t.Helper()
				before := testutil.ToFloat64(k.server.metrics.corrected)
				c := k.open()
				c.duplex(first{modes: modesOf(modeDuplex, mode)}, []byte(chat))
				if got := c.answered(mode, nil, trailers, chunks...); got != want {
					t.Errorf("by %q: got %s, want %s", chunks, got, want)
				}
				eventually(t, "released", func() bool { return inFlight(k.snapshot) == 0 })
				n := 0.0
				if want != strings.Join(chunks, "") {
					n = 1
				}
				if got := testutil.ToFloat64(k.server.metrics.corrected) - before; got != n {
					t.Errorf("%v responses counted, want %v", got, n)
				}
			}
			f(wholeRight, false, wholeAnswer)
			f(wholeRight, true, wholeAnswer)
			f(right, false, wrong)
			if mode == modeBuffered {
				return
			}
			f(wholeRight, false, bytewise(wholeAnswer)...)
			f(right, false, bytewise(wrong)...)
			f(right, false, wrong[:cut], wrong[cut:], "")
			f(right, false, wrong[:cut], "", wrong[cut:])
			f(right, true, bytewise(wrong)...)
			// A body that ends within the number is whole all the same.
			f(wrong[:cut], false, bytewise(wrong[:cut])...)
			if mode == modeDuplex {
				f(wrong[:cut], true, bytewise(wrong[:cut])...)
			}
		})
	}
}

// TestNothingIsHeldWhereTrailersAreAnnounced: a STREAMED body cannot grow any more when they have come.
func TestNothingIsHeldWhereTrailersAreAnnounced(t *testing.T) {
	k := prefilledWith(t, claimed(16))
	c := k.open()
	c.duplex(first{modes: modesOf(modeDuplex, modeStreamed)}, []byte(chat))
	cut := wholeAnswer[:strings.LastIndex(wholeAnswer, "4}")]
	if got := c.answered(modeStreamed, []string{"trailer", "x-done"}, true, bytewise(cut)...); got != cut {
		t.Errorf("got %s, want %s", got, cut)
	}
}

func TestCachedTokensStay(t *testing.T) {
	for name, tt := range map[string]struct {
		out     sidecar.Outcome
		headers []string
	}{
		"aggregated":         {out: sidecar.Outcome{Name: "aggregated", CachedTokens: -1}},
		"prefill fell back":  {out: sidecar.Outcome{Name: "fallback-timeout", HasHandle: true, CachedTokens: 16}},
		"nothing is claimed": {out: sidecar.Outcome{Name: "disaggregated", CachedTokens: 16}},
		"not said":           {out: claimed(-1)},
		"prefill found more": {out: claimed(200)},
		"compressed":         {out: claimed(16), headers: []string{"content-encoding", "gzip"}},
	} {
		t.Run(name, func(t *testing.T) {
			k := prefilledWith(t, tt.out)
			for _, mode := range []procv3.ProcessingMode_BodySendMode{modeDuplex, modeStreamed, modeBuffered} {
				c := k.open()
				c.duplex(first{modes: modesOf(modeDuplex, mode)}, []byte(chat))
				if got := c.answered(mode, tt.headers, false, wholeAnswer); got != wholeAnswer {
					t.Errorf("%v: got %s", mode, got)
				}
			}
			if n := testutil.ToFloat64(k.server.metrics.corrected); n != 0 {
				t.Errorf("%v responses counted", n)
			}
		})
	}
}

// TestTokenChunkAllocations: reading a chunk for usage that may be corrected allocates nothing.
func TestTokenChunkAllocations(t *testing.T) {
	k := prefilledWith(t, claimed(16))
	st := &stream{server: k.server, responseMode: modeDuplex}
	st.in.Headers, _ = readHeaders(first{}.message(t).GetRequestHeaders())
	st.in.HasBody = true
	st.in.Body.Append([]byte(chat))
	x, err := k.server.opts.Director.Begin(&st.in)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := x.Run(t.Context()); err != nil || x.CachedTokens() != 16 {
		t.Fatalf("%v, %d cached tokens", err, x.CachedTokens())
	}
	defer x.Done(director.EndSeen)
	st.exchange, st.response.keeps = x, true
	chunk := &extprocv3.HttpBody{Body: []byte(streamStart)}
	echoed := alloctest.Each(t, func() { st.onResponseBody(chunk) })
	st.response.scanning = true
	alloctest.AtMost(t, echoed, "scanned, with the ceiling of what is only echoed", func() { st.onResponseBody(chunk) })
}
