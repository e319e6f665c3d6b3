// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strings"
	"time"
)

const maxErrorBody = 4 << 10

// A result is what the client saw of one request.
type result struct {
	ID               string
	Status           int
	Outcome          string // x-baton-outcome
	FirstToken       time.Duration
	Total            time.Duration
	PromptTokens     int
	CompletionTokens int
	Err              error // nil when the answer came whole
	Stopped          bool  // the demo ended before the answer did: neither answered nor failed
}

// A client sends chat requests to one address.
type client struct {
	http  *http.Client
	base  string // http://ip:port
	model string
}

func newHTTPClient() *http.Client {
	return &http.Client{
		Transport: &http.Transport{
			MaxIdleConnsPerHost: 256,
			// vLLM closes idle connections after 5 s; closing them first means that none is used while it goes.
			IdleConnTimeout:    4 * time.Second,
			DisableCompression: true,
		},
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}
}

type message struct {
	Role    string `json:"role"`
	Content string `json:"content"`
}

type chatBody struct {
	Model         string         `json:"model"`
	Messages      []message      `json:"messages"`
	MaxTokens     int            `json:"max_tokens"`
	Temperature   int            `json:"temperature"`
	Stream        bool           `json:"stream"`
	StreamOptions map[string]any `json:"stream_options,omitempty"`
	CacheSalt     string         `json:"cache_salt,omitempty"`
	TokenIDs      bool           `json:"return_token_ids,omitempty"`
}

func (c *client) body(r chat) chatBody {
	return chatBody{
		Model:     c.model,
		Messages:  []message{{"system", r.System}, {"user", r.User}},
		MaxTokens: r.MaxTokens,
	}
}

func (c *client) post(ctx context.Context, id string, b chatBody) (*http.Response, error) {
	data, err := json.Marshal(b)
	if err != nil {
		return nil, fmt.Errorf("request body: %w", err)
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, c.base+"/v1/chat/completions", bytes.NewReader(data))
	if err != nil {
		return nil, fmt.Errorf("request: %w", err)
	}
	req.Header.Set("Content-Type", "application/json")
	req.Header.Set("X-Request-Id", id)
	return c.http.Do(req)
}

// stream sends r and reads the streamed answer to its end.
func (c *client) stream(ctx context.Context, r chat) result {
	started := time.Now()
	out := result{ID: r.ID}
	b := c.body(r)
	b.Stream = true
	b.StreamOptions = map[string]any{"include_usage": true}
	resp, err := c.post(ctx, r.ID, b)
	if err != nil {
		out.Err = err
		return out
	}
	defer resp.Body.Close()
	out.Status = resp.StatusCode
	out.Outcome = resp.Header.Get("X-Baton-Outcome")
	if resp.StatusCode != http.StatusOK {
		text, _ := io.ReadAll(io.LimitReader(resp.Body, maxErrorBody)) // the status says enough
		out.Err = fmt.Errorf("status %d: %s", resp.StatusCode, strings.TrimSpace(string(text)))
		return out
	}
	out.Err = out.read(resp.Body, started)
	out.Total = time.Since(started)
	return out
}

// A chunk is what the demo reads of one streamed event.
type chunk struct {
	Choices []struct {
		Delta struct {
			Content string `json:"content"`
		} `json:"delta"`
		FinishReason string `json:"finish_reason"`
	} `json:"choices"`
	Usage *struct {
		PromptTokens     int `json:"prompt_tokens"`
		CompletionTokens int `json:"completion_tokens"`
	} `json:"usage"`
	Error *struct {
		Message string `json:"message"`
	} `json:"error"`
}

var (
	errCutOff  = errors.New("the stream ended without [DONE]")
	errNoToken = errors.New("the stream held no token")
)

func (r *result) read(body io.Reader, started time.Time) error {
	finished := ""
	for data, err := range events(body) {
		if err != nil {
			return fmt.Errorf("%w: %w", errCutOff, err)
		}
		if string(data) == "[DONE]" {
			return r.check(finished)
		}
		var c chunk
		if err := json.Unmarshal(data, &c); err != nil {
			return fmt.Errorf("streamed event: %w", err)
		}
		if c.Error != nil {
			return fmt.Errorf("streamed error: %s", c.Error.Message)
		}
		if c.Usage != nil {
			r.PromptTokens, r.CompletionTokens = c.Usage.PromptTokens, c.Usage.CompletionTokens
		}
		for _, choice := range c.Choices {
			if choice.Delta.Content != "" && r.FirstToken == 0 {
				r.FirstToken = time.Since(started)
			}
			if choice.FinishReason != "" {
				finished = choice.FinishReason
			}
		}
	}
	return errCutOff
}

func (r *result) check(finished string) error {
	if r.FirstToken == 0 {
		return errNoToken
	}
	if finished != "length" && finished != "stop" {
		return fmt.Errorf("finish reason %q", finished)
	}
	return nil
}

// events yields the data of each server-sent event until the stream ends. The slice is good until the next one.
func events(body io.Reader) func(yield func([]byte, error) bool) {
	return func(yield func([]byte, error) bool) {
		sc := bufio.NewScanner(body)
		sc.Buffer(nil, 4<<20)
		for sc.Scan() {
			data, ok := bytes.CutPrefix(sc.Bytes(), []byte("data:"))
			if ok && !yield(bytes.TrimSpace(data), nil) {
				return
			}
		}
		if err := sc.Err(); err != nil {
			yield(nil, err)
		}
	}
}

// getJSON reads one JSON document of at most 16 MiB.
func getJSON(ctx context.Context, h *http.Client, url string, into any) error {
	resp, err := get(ctx, h, url, "application/json")
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	if err := json.NewDecoder(io.LimitReader(resp.Body, 16<<20)).Decode(into); err != nil {
		return fmt.Errorf("GET %s: %w", url, err)
	}
	return nil
}

// get returns an answer of status 200, whose body the caller closes.
func get(ctx context.Context, h *http.Client, url, accept string) (*http.Response, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, http.NoBody)
	if err != nil {
		return nil, fmt.Errorf("GET %s: %w", url, err)
	}
	req.Header.Set("Accept", accept)
	resp, err := h.Do(req)
	if err != nil {
		return nil, err
	}
	if resp.StatusCode != http.StatusOK {
		resp.Body.Close()
		return nil, fmt.Errorf("GET %s: status %d", url, resp.StatusCode)
	}
	return resp, nil
}
