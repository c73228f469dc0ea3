/* SPDX-License-Identifier: Apache-2.0 */
/* A hash table of things that carry their own link; a key may be there more than once. */
#ifndef FUSECR_GUARD_TABLE_H
#define FUSECR_GUARD_TABLE_H

#include <stddef.h>
#include <stdint.h>

#define container_of(pointer, type, member) ((type *)((char *)(pointer) - offsetof(type, member)))

struct link {
	struct link *next;
	uint64_t key;
};

struct table {
	struct link **buckets;
	unsigned int bits;	/* log2 of how many; 0: none yet */
	size_t count;
};

void table_add(struct table *table, struct link *link, uint64_t key);
void table_remove(struct table *table, struct link *link);

/* The first with @key or NULL, and the next one with the same key. */
struct link *table_find(const struct table *table, uint64_t key);
struct link *table_again(const struct link *link);

/* Any one of the chain @bucket, for walks over everything: for (i = 0; i < table_size(t); i++). */
size_t table_size(const struct table *table);

/* A keyed hash of @bytes: the daemon chooses names and ids, and must not choose collisions with them. */
uint64_t hash_bytes(uint64_t start, const void *bytes, size_t size);

/* malloc() and realloc() that do not return without memory: the guard ends, and the agent starts another. */
void *must_alloc(size_t size);
void *must_realloc(void *old, size_t size);

#endif /* FUSECR_GUARD_TABLE_H */
