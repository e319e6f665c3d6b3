// SPDX-License-Identifier: Apache-2.0

package app

import (
	"bytes"
	"io"
	"maps"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"strings"
	"testing"

	"github.com/baton-epp/baton/manifests/envoy"
)

// usageModes are the gateways that show response bodies.
func usageModes() []responseMode {
	var with []responseMode
	for _, m := range responseModes() {
		if m.end == "bodies" {
			with = append(with, m)
		}
	}
	return with
}

// TestEnvoyUsageIsThePrefills: in every mode that shows bodies, clients see what the prefill found cached.
func TestEnvoyUsageIsThePrefills(t *testing.T) {
	t.Parallel()
	for _, m := range usageModes() {
		t.Run(m.name, func(t *testing.T) {
			t.Parallel()
			s := newStack(t, stackOptions{pool: oldPair(), envoy: m.envoy, rewrite: m.rewrite})
			for name, r := range usageRequests() {
				for round := range 2 {
					answer := s.post(r.path, r.body)
					if answer.status != http.StatusOK || answer.header.Get("x-baton-outcome") != "disaggregated" {
						t.Fatalf("%s: %d %s", name, answer.status, answer.body)
					}
					checkSaid(t, answer.body, round, true)
				}
			}
			if n := s.sum("baton_extproc_usage_corrected_total"); n != float64(2*len(usageRequests())) {
				t.Errorf("%v responses counted", n)
			}
			s.settled()
		})
	}
}

// splitter passes requests on to a model server and cuts its answers within the count of cached tokens.
type splitter struct {
	to   string
	goOn chan struct{} // the rest may follow
}

func (p *splitter) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	req, err := http.NewRequestWithContext(r.Context(), r.Method, p.to+r.RequestURI, r.Body)
	if err != nil {
		panic(err)
	}
	req.Header = r.Header.Clone()
	req.ContentLength = r.ContentLength
	resp, err := http.DefaultTransport.RoundTrip(req)
	if err != nil {
		w.WriteHeader(http.StatusBadGateway)
		return
	}
	defer resp.Body.Close()
	body, _ := io.ReadAll(resp.Body) // cut off, it is passed on cut off
	maps.Copy(w.Header(), resp.Header)
	w.WriteHeader(resp.StatusCode)
	if before, _, found := bytes.Cut(body, []byte(cachedKey)); found {
		n := len(before) + len(cachedKey) + 1
		_, _ = w.Write(body[:n])
		_ = http.NewResponseController(w).Flush()
		select {
		case <-p.goOn:
		case <-r.Context().Done():
		}
		body = body[n:]
	}
	_, _ = w.Write(body) // the client may be gone
}

const cachedKey = `"cached_tokens":`

// TestEnvoyUsageCutWithinTheNumber: the number's first digit waits for the others, and nothing else does.
func TestEnvoyUsageCutWithinTheNumber(t *testing.T) {
	t.Parallel()
	for _, m := range usageModes() {
		if m.name == "buffered response" {
			continue // the answer comes in one piece
		}
		for _, stream := range []string{"whole", "streamed"} {
			t.Run(m.name+"/"+stream, func(t *testing.T) {
				t.Parallel()
				p := &splitter{goOn: make(chan struct{})}
				server := httptest.NewServer(p)
				t.Cleanup(server.Close)
				at := netip.MustParseAddrPort(server.Listener.Addr().String())
				s := newStack(t, stackOptions{
					pool: oldPair(), envoy: m.envoy, rewrite: m.rewrite,
					values: func(v *envoy.Values) { v.Endpoints = append(v.Endpoints, at) },
				})
				prefill, decode := s.engines("prefill")[0], s.engines("decode")[0]
				p.to = decode.URL()
				s.writeEndpointLines(endpointLines(prefill.Name(), prefill.Addr(), "prefill"), endpointLines("split", at, "decode"))
				eventually(t, "the splitter is the decode endpoint", func() bool { return s.app.Snapshot().ByAddr(at) != nil })
				s.cutWithinTheNumber(p, usageRequests()["chat completions/"+stream].body)
				s.settled()
			})
		}
	}
}

func (s *stack) cutWithinTheNumber(p *splitter, body string) {
	s.t.Helper()
	req, err := http.NewRequestWithContext(s.t.Context(), http.MethodPost, s.envoy.URL+"/v1/chat/completions", strings.NewReader(body))
	if err != nil {
		s.t.Fatal(err)
	}
	req.Header.Set("Content-Type", "application/json")
	resp, err := s.client.Do(req)
	if err != nil {
		s.t.Fatal(err)
	}
	defer resp.Body.Close()
	var got bytes.Buffer
	for chunk := make([]byte, 1<<10); !strings.HasSuffix(got.String(), cachedKey); {
		n, err := resp.Body.Read(chunk)
		got.Write(chunk[:n])
		if err != nil {
			s.t.Fatalf("%v after %s", err, got.String())
		}
	}
	close(p.goOn)
	if _, err := got.ReadFrom(resp.Body); err != nil {
		s.t.Fatal(err)
	}
	if _, cached := said(s.t, got.String()); cached != 0 {
		s.t.Errorf("%d tokens cached, want none: %s", cached, got.String())
	}
}
