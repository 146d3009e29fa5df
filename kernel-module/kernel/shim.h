/* SPDX-License-Identifier: GPL-2.0-only */
/* Both sides of the border between shim.c and entry.rs. */
#include <linux/types.h>

struct mm_struct;

/* The core, kernel/entry.rs. */
long poolskip_start(bool on_xen);
void poolskip_stop(void);
bool poolskip_is_announced(void);
bool poolskip_watch_fired(void);
long poolskip_read(u64 to, size_t room, bool *more);
void poolskip_close(void);
long poolskip_ioctl(u32 command, u64 argument);

/* What the core calls; declared since newer kernels ask for it. */
u64 shim_page_allocate(void);
void shim_page_free(u64 pfn);
void *shim_page_address(u64 pfn);
void shim_store_release(u64 *to, u64 value);
int shim_copy_from_user(void *to, u64 from, size_t length);
int shim_copy_to_user(u64 to, const void *from, size_t length);
struct mm_struct *shim_mm_get(int number);
long shim_translate(struct mm_struct *mm, u64 address, u64 *pfns, size_t count);
int shim_xenstore_write(const char *node, const char *value);
long shim_xenstore_read(const char *node, char *to, size_t room);
int shim_xenstore_remove(void);
int shim_event_channel_op(int operation, void *argument);
