// SPDX-License-Identifier: Apache-2.0

package app

import (
	"encoding/json"
	"fmt"
	"net/http"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/baton-epp/baton/director"
	"github.com/baton-epp/baton/pool"
)

// The size of the ring behind /debug/decisions and of a follower's backlog (docs/design.md 1).
const (
	ringSize        = 1024
	followerBacklog = 256
	maxFollowers    = 16
)

// ring keeps the last decisions for those who ask why. It exists only with --enable-debug, so the lock is on no request's
// way otherwise. Safe for concurrent use.
type ring struct {
	mu        sync.Mutex
	records   [ringSize]*director.Record         // guarded by mu
	next      int                                // guarded by mu; total number of records ever put
	followers map[chan *director.Record]struct{} // guarded by mu
}

func newRing() *ring { return &ring{followers: map[chan *director.Record]struct{}{}} }

// put stores a record and hands it to the followers; one that does not keep up misses records.
func (r *ring) put(rec *director.Record) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.records[r.next%ringSize] = rec
	r.next++
	for f := range r.followers {
		select {
		case f <- rec:
		default:
		}
	}
}

// last returns up to n records, newest first, optionally of one request only.
func (r *ring) last(n int, requestID string) []*director.Record {
	r.mu.Lock()
	defer r.mu.Unlock()
	out := []*director.Record{}
	for i := r.next - 1; i >= 0 && i >= r.next-ringSize && len(out) < n; i-- {
		if rec := r.records[i%ringSize]; requestID == "" || rec.RequestID == requestID {
			out = append(out, rec)
		}
	}
	return out
}

// follow registers a follower; ok is false when there are too many.
func (r *ring) follow() (ch chan *director.Record, stop func(), ok bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if len(r.followers) >= maxFollowers {
		return nil, nil, false
	}
	ch = make(chan *director.Record, followerBacklog)
	r.followers[ch] = struct{}{}
	return ch, func() {
		r.mu.Lock()
		defer r.mu.Unlock()
		delete(r.followers, ch)
	}, true
}

// serveDecisions is GET /debug/decisions?n=&request_id=: JSON, or server-sent events for those who accept them.
func (r *ring) serveDecisions(w http.ResponseWriter, req *http.Request) {
	n := 100
	if text := req.URL.Query().Get("n"); text != "" {
		v, err := strconv.Atoi(text)
		if err != nil || v < 1 || v > ringSize {
			http.Error(w, fmt.Sprintf("n: must be a number from 1 to %d", ringSize), http.StatusBadRequest)
			return
		}
		n = v
	}
	if strings.Contains(req.Header.Get("Accept"), "text/event-stream") {
		r.serveEvents(w, req)
		return
	}
	writeJSON(w, r.last(n, req.URL.Query().Get("request_id")))
}

func (r *ring) serveEvents(w http.ResponseWriter, req *http.Request) {
	records, stop, ok := r.follow()
	if !ok {
		http.Error(w, fmt.Sprintf("too many followers (at most %d)", maxFollowers), http.StatusTooManyRequests)
		return
	}
	defer stop()
	control := http.NewResponseController(w)
	w.Header().Set("Content-Type", "text/event-stream")
	w.Header().Set("Cache-Control", "no-store")
	beat := time.NewTicker(15 * time.Second) // keeps proxies from closing an idle stream
	defer beat.Stop()
	for {
		if err := control.Flush(); err != nil {
			return
		}
		select {
		case <-req.Context().Done():
			return
		case <-beat.C:
			if _, err := w.Write([]byte(": \n\n")); err != nil {
				return
			}
		case rec := <-records:
			text, err := json.Marshal(rec)
			if err != nil {
				return
			}
			if _, err := fmt.Fprintf(w, "data: %s\n\n", text); err != nil {
				return
			}
		}
	}
}

// endpointView is one endpoint as /debug/endpoints shows it.
type endpointView struct {
	Endpoint     string            `json:"endpoint"`
	Address      string            `json:"address"`
	Role         string            `json:"role"`
	Labels       map[string]string `json:"labels,omitempty"`
	Ready        bool              `json:"ready"`
	Standing     string            `json:"standing"`
	Fresh        bool              `json:"fresh"`
	Queue        float64           `json:"queue"`
	Running      float64           `json:"running"`
	KVCacheUsage float64           `json:"kv_cache_usage"` // fraction, 0–1
	InFlight     int64             `json:"in_flight"`
	Tokens       int64             `json:"in_flight_tokens"`
	KVExpired    float64           `json:"kv_expired"`
	Engine       string            `json:"engine"`
	// What earlier prefills there have shown; 0 while nothing is known.
	PrefillSpeed float64 `json:"prefill_tokens_per_second"`
	PrefillWait  float64 `json:"prefill_queue_seconds"`
}

// serveEndpoints is GET /debug/endpoints: the pool as the scheduler sees it now.
func serveEndpoints(snapshot func() *pool.Snapshot) http.HandlerFunc {
	return func(w http.ResponseWriter, _ *http.Request) {
		now := time.Now()
		endpoints := snapshot().Endpoints
		views := make([]endpointView, 0, len(endpoints))
		for _, e := range endpoints {
			m, standing := e.Metrics(), e.Health.Standing(now)
			views = append(views, endpointView{
				Endpoint: e.ID(), Address: e.Hostport, Role: e.Labels[pool.LabelRole], Labels: e.Labels,
				Ready: standing != pool.NotReady, Standing: standing.String(), Fresh: m.Fresh(now),
				Queue: m.Waiting, Running: m.Running, KVCacheUsage: m.KVCacheUsage,
				InFlight: e.Load.Requests(), Tokens: e.Load.Tokens(), KVExpired: m.KVExpired,
				Engine: e.Engine, PrefillSpeed: e.Pace.TokensPerSecond(), PrefillWait: e.Pace.Queue(now).Seconds(),
			})
		}
		writeJSON(w, views)
	}
}

func writeJSON(w http.ResponseWriter, v any) {
	w.Header().Set("Content-Type", "application/json")
	w.Header().Set("Cache-Control", "no-store")
	if err := json.NewEncoder(w).Encode(v); err != nil {
		return // the reader left
	}
}
