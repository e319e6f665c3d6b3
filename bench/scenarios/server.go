// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"strconv"
	"strings"
	"time"
)

const maxAnswer = 16 << 20

// server is one model server under observation.
type server struct {
	url    string
	client *http.Client
}

func newServer(url string) *server {
	// Real servers close idle connections after 5 s: a request in that moment would look like a fault of theirs.
	return &server{url: strings.TrimRight(url, "/"), client: &http.Client{Transport: &http.Transport{DisableKeepAlives: true}}}
}

// reading is what a server's metrics say.
type reading struct {
	running, waiting float64
	usage            float64 // fraction of the KV blocks in use, 0–1
	expired          float64 // prefills whose lease ended
	late             float64 // notifications about prefills that were free already
	failed           float64 // transfers
	pulled           float64 // prompt tokens that came by KV transfer
}

func (r *reading) quiet() bool { return r.running+r.waiting == 0 && r.usage < 1e-9 }

// series maps a series' name to where its value goes.
func (r *reading) series(name string) *float64 {
	switch name {
	case "vllm:num_requests_running":
		return &r.running
	case "vllm:num_requests_waiting":
		return &r.waiting
	case "vllm:kv_cache_usage_perc":
		return &r.usage
	case "vllm:nixl_num_kv_expired_reqs_total":
		return &r.expired
	case "vllm:nixl_num_notifications_after_expiry_total":
		return &r.late
	case "vllm:nixl_num_failed_transfers_total":
		return &r.failed
	case "vllm:prompt_tokens_by_source_total":
		return &r.pulled
	}
	return nil
}

// read scrapes the metrics page.
func (s *server) read(ctx context.Context) (*reading, error) {
	ctx, cancel := context.WithTimeout(ctx, scrapeLimit)
	defer cancel()
	resp, err := s.do(ctx, http.MethodGet, "/metrics", nil)
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	r := &reading{}
	lines := bufio.NewScanner(io.LimitReader(resp.Body, maxAnswer))
	for lines.Scan() {
		name, rest, _ := strings.Cut(lines.Text(), "{")
		at := r.series(name)
		labels, value, ok := strings.Cut(rest, "} ")
		if at == nil || !ok || at == &r.pulled && !strings.Contains(labels, `source="external_kv_transfer"`) {
			continue
		}
		v, err := strconv.ParseFloat(value, 64)
		if err != nil {
			return nil, fmt.Errorf("metrics of %s: %q", s.url, lines.Text())
		}
		*at += v
	}
	return r, lines.Err() //nolint:wrapcheck // of the connection
}

func (s *server) do(ctx context.Context, method, path string, body []byte) (*http.Response, error) {
	req, err := http.NewRequestWithContext(ctx, method, s.url+path, bytes.NewReader(body))
	if err != nil {
		return nil, err //nolint:wrapcheck // names the URL
	}
	req.Header.Set("Content-Type", "application/json")
	return s.client.Do(req) //nolint:wrapcheck // names the URL
}

// healthy reports whether the server answers.
func (s *server) healthy(ctx context.Context) bool {
	ctx, cancel := context.WithTimeout(ctx, scrapeLimit)
	defer cancel()
	resp, err := s.do(ctx, http.MethodGet, "/health", nil)
	if err != nil {
		return false
	}
	resp.Body.Close()
	return resp.StatusCode == http.StatusOK
}

// ask sends a request and reads the whole answer.
func (s *server) ask(ctx context.Context, q request) (*reply, error) {
	ctx, cancel := context.WithTimeoutCause(ctx, answerLimit, fmt.Errorf("no answer within %v", answerLimit))
	defer cancel()
	resp, err := s.do(ctx, http.MethodPost, q.path, q.encode())
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(io.LimitReader(resp.Body, maxAnswer))
	if err != nil {
		return nil, fmt.Errorf("answer of %s: %w", s.url, err)
	}
	return newReply(resp.StatusCode, body), nil
}

// poll asks ok until it holds; false when limit or ctx ended first.
func poll(ctx context.Context, limit time.Duration, ok func() bool) bool {
	end := time.NewTimer(limit)
	defer end.Stop()
	tick := time.NewTicker(pollInterval)
	defer tick.Stop()
	for !ok() {
		select {
		case <-tick.C:
		case <-end.C:
			return ok()
		case <-ctx.Done():
			return false
		}
	}
	return true
}

// reply is a whole answer.
type reply struct {
	status int
	texts  []string // of the choices
	finish string   // of the first choice
	handle json.RawMessage
	handed bool // a handle stood anywhere in the answer
	prompt int  // tokens
	body   []byte
}

// answer is what the four APIs answer, as far as it is read.
type answer struct {
	Choices []struct {
		Text    string
		Message struct{ Content string }
		Finish  string `json:"finish_reason"`
	}
	Output     []struct{ Content []struct{ Text string } }
	Content    []struct{ Text string }
	StopReason string `json:"stop_reason"`
	Status     string
	Handle     json.RawMessage `json:"kv_transfer_params"`
	Usage      struct {
		Prompt int `json:"prompt_tokens"`
		Input  int `json:"input_tokens"`
		// Of /v1/messages, which takes both out of the input tokens.
		Cached int `json:"cache_read_input_tokens"`
		Stored int `json:"cache_creation_input_tokens"`
	}
}

func newReply(status int, body []byte) *reply {
	r := &reply{status: status, body: body, handed: bytes.Contains(body, []byte("remote_engine_id"))}
	var a answer
	if json.Unmarshal(body, &a) != nil {
		return r // a stream, or no JSON: the status says enough
	}
	for _, c := range a.Choices {
		r.texts = append(r.texts, c.Text+c.Message.Content)
		if r.finish == "" {
			r.finish = c.Finish
		}
	}
	for _, o := range a.Output {
		for _, c := range o.Content {
			r.texts = append(r.texts, c.Text)
		}
	}
	for _, c := range a.Content {
		r.texts = append(r.texts, c.Text)
	}
	if r.finish == "" {
		r.finish = a.StopReason + a.Status
	}
	if !bytes.Equal(a.Handle, []byte("null")) {
		r.handle = a.Handle
	}
	r.prompt = max(a.Usage.Prompt, a.Usage.Input+a.Usage.Cached+a.Usage.Stored)
	return r
}
